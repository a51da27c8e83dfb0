/* SPDX-License-Identifier: Apache-2.0 */
/*
 * nep-info: what is here. Each part says the same for people and as JSON; with --json - only the
 * JSON goes to standard output.
 */
#include <errno.h>
#include <stddef.h>
#include <string.h>

#include "base/out_file.h"
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
    static struct nep_out_file json;
    if (info.json_path != NULL) {
        if (nep_out_file_open_arg(&json, info.json_path) != NEP_OK) {
            return info_error(INFO_UNUSABLE, "--json %s", nep_last_message());
        }
        info.json.file = json.file;
        info.out = json.file == stdout ? fopen("/dev/null", "we") : stdout;
        if (info.out == NULL) {
            return info_error(INFO_FAILED, "cannot open /dev/null: %s", strerror(errno));
        }
    }
    json_open(&info.json, NULL, '{');
    json_text(&info.json, "version", nep_version_string());
    status = run(&info);
    json_close(&info.json, '}');
    if (fflush(info.out) != 0) {
        nep_out_file_drop(&json);
        return info_error(INFO_FAILED, "cannot write: %s", strerror(errno));
    }
    if (info.json.file != NULL) {
        fputc('\n', info.json.file);
        if (nep_out_file_commit(&json) != NEP_OK) {
            return info_error(INFO_FAILED, "--json %s", nep_last_message());
        }
    }
    return status;
}
