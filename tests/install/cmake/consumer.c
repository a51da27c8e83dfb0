/* SPDX-License-Identifier: Apache-2.0 */
#include <nearep.h>
#include <stdio.h>

int main(void)
{
    struct nep_map *map = NULL;
    struct nep_map_shape shape = {.size = sizeof(shape), .num_layers = 1};

    /* A shape without experts is refused: the library is really called, not only linked. */
    if (nep_map_contiguous(&shape, &map) != NEP_ERR_INVALID || nep_last_message()[0] == '\0') {
        return 1;
    }
    return printf("nearep %s\n", nep_version_string()) < 0;
}
