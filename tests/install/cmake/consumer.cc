// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <nearep.h>

int main()
{
    nep_map_shape shape = {};
    shape.size = sizeof(shape);
    shape.num_layers = 1;
    nep_map *map = nullptr;
    if (nep_map_contiguous(&shape, &map) != NEP_ERR_INVALID || nep_last_message()[0] == '\0') {
        return 1;
    }
    return std::printf("nearep %s\n", nep_version_string()) < 0;
}
