/* SPDX-License-Identifier: Apache-2.0 */
/* Any lines as the environment: refused with a sentence, or read so that printing reads the same.
 */
#include "base/config.h"
#include "base/log.h"
#include "tests/fuzz/fuzz.h"

enum { MAX_LINES = 64 };

static void check_back(const struct nep_config *config)
{
    char text[64][600];
    const char *variables[65];
    uint32_t num = 0;
    struct nep_config back;
    for (uint32_t i = 0; i < nep_config_num_rows(); i++) {
        char value[512];
        nep_config_format(config, i, value, sizeof value);
        if (strcmp(value, "(set)") == 0) {
            continue;
        }
        snprintf(text[num], sizeof text[num], "%s=%s", nep_config_row_at(i).name, value);
        variables[num] = text[num];
        num++;
    }
    variables[num] = NULL;
    PROMISE(nep_config_load_from(&back, variables) == NEP_OK);
    PROMISE(nep_config_digest(&back) == nep_config_digest(config));
    PROMISE(back.timeout_ns == config->timeout_ns && back.pool_bytes == config->pool_bytes);
    PROMISE(strcmp(back.rendezvous, config->rendezvous) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    char *lines[MAX_LINES + 1];
    struct nep_config config;
    nep_log_open(NEP_LOG_NONE, "");
    char *text = fuzz_lines(data, len, lines, MAX_LINES);
    if (nep_config_load_from(&config, (const char *const *)lines) == NEP_OK) {
        check_back(&config);
    } else {
        PROMISE(nep_last_message()[0] != '\0');
    }
    for (size_t i = 0; lines[i] != NULL; i++) {
        uint64_t number, again;
        char host[64], out[64];
        uint16_t port;
        if (nep_parse_time_ns(lines[i], &number) == NEP_OK) {
            nep_format_time_ns(number, out, sizeof out);
            PROMISE(nep_parse_time_ns(out, &again) == NEP_OK && again == number);
        }
        if (nep_parse_bytes(lines[i], &number) == NEP_OK) {
            nep_format_bytes(number, out, sizeof out);
            PROMISE(nep_parse_bytes(out, &again) == NEP_OK && again == number);
        }
        if (nep_parse_host_port(lines[i], "line", host, sizeof host, &port) == NEP_OK) {
            PROMISE(port != 0 && host[0] != '\0' && strlen(host) < sizeof host);
        }
    }
    free(text);
    return 0;
}
