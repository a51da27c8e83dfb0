/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any active message as a put over UCX: what a header says is written in a slot of its sender or
 * not at all, and never more than what came. Input: messages, each a byte for the length of the
 * header (0 to 63; 40 is right), that header, a byte for the length of the payload, that payload. A
 * byte with its top bit set makes identity and window right, since few inputs would guess them.
 */
#include "base/log.h"
#include "tests/fuzz/fuzz.h"

#if NEP_HAVE_UCX

#include "transport/ucx.h"

enum { NUM_RANKS = 3, GUARD = 64, WINDOW = 64, NUMBER = 3, RIGHT = 0x80, NOBODYS = 40 };

static char memory[GUARD + WINDOW + GUARD];
static uint64_t num_heard;

static void sink(void *base, uint32_t dst, uint32_t src, uint32_t imm)
{
    (void)imm;
    PROMISE(base == memory + GUARD && dst == 1 && src < NUM_RANKS && src != 1);
    num_heard++;
}

static struct nep_ucx *receiver_create(void)
{
    static uint64_t bytes[NUM_RANKS] = {0, WINDOW, 0};
    struct nep_ucx *ux = calloc(1, sizeof *ux);
    PROMISE(ux != NULL);
    ux->rank = 1;
    ux->num_ranks = NUM_RANKS;
    ux->params.sink = sink;
    ux->peers = calloc(NUM_RANKS, sizeof *ux->peers);
    PROMISE(ux->peers != NULL);
    ux->peers[0].pass_from = 0x1234;
    ux->peers[2].pass_from = 0x4321;
    const struct nep_grant grants[] = {{0, 0, NOBODYS}, {2, NOBODYS + 1, WINDOW - NOBODYS - 1}};
    PROMISE(nep_grants_set(&ux->windows[NUMBER].grants, NUM_RANKS, grants, 2) == NEP_OK);
    ux->windows[NUMBER].base = memory + GUARD;
    ux->windows[NUMBER].bytes = bytes;
    ux->windows[NUMBER].life = 5;
    atomic_store(&ux->windows[NUMBER].alive, true);
    return ux;
}

static void partials_free(struct nep_ucx_partial *partial)
{
    while (partial != NULL) {
        struct nep_ucx_partial *next = partial->next;
        free(partial);
        partial = next;
    }
}

static void receiver_destroy(struct nep_ucx *ux)
{
    partials_free(ux->unused_partials);
    for (uint32_t i = 0; i < NUM_RANKS; i++) {
        partials_free(ux->peers[i].partials);
    }
    nep_grants_free(&ux->windows[NUMBER].grants);
    free(ux->peers);
    free(ux);
}

/* Takes a length, then as many bytes as there are; moves on. */
static const uint8_t *take(const uint8_t **data, size_t *left, size_t *len, bool *is_right)
{
    *len = *left != 0 ? (*data)[0] & 63 : 0;
    *is_right = *left != 0 && ((*data)[0] & RIGHT) != 0;
    size_t head = *left != 0 ? 1 : 0;
    *data += head;
    *left -= head;
    *len = *len > *left ? *left : *len;
    const uint8_t *at = *data;
    *data += *len;
    *left -= *len;
    return at;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    nep_log_open(NEP_LOG_NONE, "");
    struct nep_ucx *ux = receiver_create();
    uint64_t num_messages = 0;
    memset(memory, 0x11, sizeof memory);
    num_heard = 0;
    while (len != 0) {
        uint8_t bytes[64];
        size_t header_len, payload_len;
        bool is_right, unused;
        const uint8_t *header = take(&data, &len, &header_len, &is_right);
        const uint8_t *payload = take(&data, &len, &payload_len, &unused);
        memcpy(bytes, header, header_len);
        if (is_right && header_len == sizeof(struct nep_ucx_header)) {
            struct nep_ucx_header head;
            memcpy(&head, bytes, sizeof head);
            head.src = head.src % 2 * 2;
            head.pass = ux->peers[head.src].pass_from;
            head.window = NUMBER;
            head.life = 5;
            memcpy(bytes, &head, sizeof head);
        }
        ucp_am_recv_param_t param = {.recv_attr = 0};
        PROMISE(nep_ucx_on_put(ux, bytes, header_len, (void *)(uintptr_t)payload, payload_len,
                               &param) == UCS_OK);
        num_messages++;
        for (size_t i = 0; i < GUARD; i++) {
            PROMISE(memory[i] == 0x11 && memory[GUARD + WINDOW + i] == 0x11);
        }
        PROMISE(memory[GUARD + NOBODYS] == 0x11);
    }
    PROMISE(num_heard <= num_messages && num_heard == ux->num_arrivals);
    receiver_destroy(ux);
    return 0;
}

#else

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    (void)data;
    (void)len;
    return 0; /* built without transport ucx: there is no such parser */
}

#endif
