/* SPDX-License-Identifier: Apache-2.0 */
/* The table of variables, in three forms from the one table in base/config.c. */
#include <string.h>

#include "tools/nep_info.h"

/* Words allowed are separated by bars, which end a cell of a Markdown table. */
static void print_cell(FILE *out, const char *text)
{
    for (; *text != '\0'; text++) {
        fprintf(out, *text == '|' ? "\\%c" : "%c", *text);
    }
}

static void print_markdown(FILE *out)
{
    fprintf(out,
            "# Configuration\n\n"
            "Every variable that nearep reads. They are read once for each communicator, and "
            "nowhere but in `base/config.c`; an unknown name\nthat begins with `NEP_` is warned "
            "about, a value that makes no sense fails the call. Times have a unit (`10ms`, `1.5s`, "
            "`2m`, `inf`), sizes\nmay have one (`4096`, `64k`, `1M`, `2G`, powers of 1024). "
            "`nep-info --config` prints this table with the values in force; this page is\n"
            "`nep-info --config --markdown`.\n\n"
            "| variable | type | default | all ranks alike | meaning |\n|---|---|---|---|---|\n");
    for (uint32_t i = 0; i < nep_config_num_rows(); i++) {
        struct nep_config_row row = nep_config_row_at(i);
        fprintf(out, "| `%s` | ", row.name);
        print_cell(out, row.type);
        fprintf(out, " | %s | %s | ", row.default_text, row.is_shared ? "yes" : "");
        print_cell(out, row.help);
        fprintf(out, " |\n");
    }
    fprintf(out, "\nThe launcher's own variables (torchrun, Open MPI, MPICH, Slurm) are in "
                 "[bootstrap.md](bootstrap.md).\n");
}

int info_config(struct info *info)
{
    if (info->is_markdown) {
        print_markdown(info->out);
    } else {
        nep_config_print(info->out, &info->config);
    }
    json_open(&info->json, "config", '[');
    for (uint32_t i = 0; i < nep_config_num_rows(); i++) {
        struct nep_config_row row = nep_config_row_at(i);
        char value[512];
        nep_config_format(&info->config, i, value, sizeof value);
        json_open(&info->json, NULL, '{');
        json_text(&info->json, "name", row.name);
        json_text(&info->json, "value", value);
        json_text(&info->json, "type", row.type);
        json_text(&info->json, "default", row.default_text);
        json_bool(&info->json, "is_set", info->config.from_env >> i & 1);
        json_bool(&info->json, "is_shared", row.is_shared);
        json_text(&info->json, "help", row.help);
        json_close(&info->json, '}');
    }
    json_close(&info->json, ']');
    return INFO_FINE;
}
