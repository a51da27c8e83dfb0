/* SPDX-License-Identifier: Apache-2.0 */
/*
 * nep-info: what is here. Each part says the same for people and as JSON; with --json - only the
 * JSON goes to standard output.
 */
#include <errno.h>
#include <stddef.h>
#include <string.h>

#include "tools/nep_info.h"

static int run(struct info *info)
{
    static const struct {
        size_t wants;
        int (*part)(struct info *info);
    } parts[] = {
        {offsetof(struct info, wants_config), info_config},
        {offsetof(struct info, wants_topology), info_topology},
        {offsetof(struct info, wants_transports), info_transports},
        {offsetof(struct info, wants_region), info_region},
        {offsetof(struct info, wants_check), info_check},
        {offsetof(struct info, wants_serve), info_serve},
        {offsetof(struct info, wants_merge), info_merge_traces},
    };
    int worst = INFO_FINE;
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        if (*(const bool *)((const char *)info + parts[i].wants)) {
            int status = parts[i].part(info);
            worst = status > worst ? status : worst;
        }
    }
    return worst;
}

int main(int argc, char **argv)
{
    static struct info info;
    int status = info_options_parse(argc, argv, &info);
    if (status != INFO_GO_ON) {
        return status;
    }
    if (nep_config_load(&info.config) != NEP_OK) {
        return info_error(INFO_UNUSABLE, "%s", nep_last_message());
    }
    info.out = stdout;
    if (info.json_path != NULL) {
        bool is_stdout = strcmp(info.json_path, "-") == 0;
        info.json.file = is_stdout ? stdout : fopen(info.json_path, "we");
        if (info.json.file == NULL) {
            return info_error(INFO_UNUSABLE, "cannot write %s: %s", info.json_path,
                              strerror(errno));
        }
        info.out = is_stdout ? fopen("/dev/null", "we") : stdout;
        if (info.out == NULL) {
            return info_error(INFO_FAILED, "cannot open /dev/null: %s", strerror(errno));
        }
    }
    json_open(&info.json, NULL, '{');
    json_text(&info.json, "version", nep_version_string());
    status = run(&info);
    json_close(&info.json, '}');
    bool is_written = fflush(info.out) == 0;
    if (info.json.file != NULL) {
        fputc('\n', info.json.file);
        is_written &= fflush(info.json.file) == 0;
    }
    return is_written ? status : info_error(INFO_FAILED, "cannot write: %s", strerror(errno));
}
