/* SPDX-License-Identifier: Apache-2.0 */
/* Any bytes as a placement map: refused with a sentence, or a map that is saved and read the same.
 */
#include <unistd.h>

#include "base/log.h"
#include "placement/placement.h"
#include "tests/fuzz/fuzz.h"

static void check_back(const struct nep_map *map)
{
    char path[64];
    struct nep_map *back = NULL;
    snprintf(path, sizeof path, "/tmp/nep_fuzz_map.%d", (int)getpid());
    PROMISE(nep_map_save(map, path) == NEP_OK);
    PROMISE(nep_map_load(path, &back) == NEP_OK);
    PROMISE(nep_map_digest(back) == nep_map_digest(map));
    nep_map_destroy(back);
    unlink(path);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    char path[64];
    struct nep_map *map = NULL;
    nep_log_open(NEP_LOG_NONE, "");
    int fd = fuzz_file(data, len, path, sizeof path);
    if (nep_map_load(path, &map) == NEP_OK) {
        struct nep_map_shape shape = {.size = sizeof shape};
        PROMISE(nep_map_get_shape(map, &shape) == NEP_OK);
        PROMISE(shape.num_layers != 0 && shape.num_experts != 0);
        check_back(map);
        nep_map_destroy(map);
    } else {
        PROMISE(map == NULL && nep_last_message()[0] != '\0');
    }
    close(fd);
    return 0;
}
