/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Ranks as threads of one process. A window is an anonymous mapping; peers get its address. Since
 * destroying is not collective, a window's memory lives until every rank that learnt of it has let
 * go: a counter in front of it, dropped by each.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "transport/bootstrap.h"
#include "transport/mapped.h"

enum { HEAD_BYTES = 4096 };

/* Stands in the page before the window. */
struct loop_head {
    atomic_uint num_users;
    size_t mapped_bytes;
};

struct loop_card {
    uint64_t process; /* the same in all threads of one process, and in no other one */
    uint64_t base;
    uint64_t bytes;
};

extern const struct nep_transport_ops nep_loop_ops;
/* Its address and contents tell processes apart, forked ones by the pid in it. */
static const char process_mark;

static uint64_t process_cookie(void)
{
    return ((uint64_t)(uintptr_t)&process_mark << 20) ^ (uint64_t)getpid();
}

static enum nep_status loop_probe(const struct nep_config *config)
{
    (void)config;
    return NEP_OK;
}

static enum nep_status loop_create(const struct nep_transport_params *params,
                                   struct nep_transport **transport_p)
{
    struct nep_mapped *loop = calloc(1, sizeof *loop);
    if (loop == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "loop: no memory for the transport");
    }
    enum nep_status status = nep_mapped_init(loop, &nep_loop_ops, params);
    if (status != NEP_OK) {
        free(loop);
        return status;
    }
    *transport_p = &loop->transport;
    return NEP_OK;
}

static void head_drop(uint8_t *base)
{
    struct loop_head *head = (struct loop_head *)(base - HEAD_BYTES);
    /* acq_rel: the last one out sees all that the others did with the memory before they let go. */
    if (atomic_fetch_sub_explicit(&head->num_users, 1, memory_order_acq_rel) == 1) {
        munmap(head, head->mapped_bytes);
    }
}

static void loop_window_destroy(struct nep_transport *transport, uint32_t window)
{
    struct nep_mapped *loop = (struct nep_mapped *)transport;
    for (uint32_t r = 0; r < loop->params.topology->num_ranks; r++) {
        if (loop->windows[window].base != NULL && loop->windows[window].base[r] != NULL) {
            head_drop(loop->windows[window].base[r]);
        }
    }
    nep_mapped_window_free(loop, window);
}

static void loop_window_retire(struct nep_transport *transport, uint32_t window, size_t keep_offset,
                               size_t keep_bytes)
{
    struct nep_mapped *loop = (struct nep_mapped *)transport;
    uint8_t *base = nep_mapped_peer_window(transport, window, loop->params.topology->rank);
    if (base != NULL) {
        struct loop_head *head = (struct loop_head *)(base - HEAD_BYTES);
        size_t end = keep_offset + keep_bytes, all = head->mapped_bytes - HEAD_BYTES;
        if (end < all) {
            munmap(base + end, all - end); /* of the pool, and never handed out */
        }
        /* The last one out unmaps what comes before; its fetch-sub follows this rank's. */
        head->mapped_bytes = HEAD_BYTES + keep_offset;
    }
    loop_window_destroy(transport, window);
}

static enum nep_status own_memory(struct nep_mapped *loop, size_t bytes, uint8_t **base_p)
{
    size_t mapped_bytes = HEAD_BYTES + bytes;
    void *memory = mmap(NULL, mapped_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        return nep_fail(NEP_ERR_NO_MEMORY, "loop: a window of %zu bytes: mmap failed: %m", bytes);
    }
    uint32_t num_users = 0;
    for (uint32_t r = 0; r < loop->params.topology->num_ranks; r++) {
        num_users += nep_mapped_serves(loop, r);
    }
    struct loop_head *head = memory;
    atomic_init(&head->num_users, num_users);
    head->mapped_bytes = mapped_bytes;
    *base_p = (uint8_t *)memory + HEAD_BYTES;
    return NEP_OK;
}

/* Checks the cards of the ranks this transport serves and takes their addresses. */
static enum nep_status take_cards(struct nep_mapped *loop, uint32_t window,
                                  const struct loop_card *cards)
{
    const struct nep_topology *topology = loop->params.topology;
    for (uint32_t r = 0; r < topology->num_ranks; r++) {
        if (!nep_mapped_serves(loop, r)) {
            continue;
        }
        if (cards[r].process != cards[topology->rank].process) {
            return nep_fail(NEP_ERR_UNSUPPORTED,
                            "loop serves ranks that are threads of one process; rank %u is not in "
                            "this one: use shm",
                            r);
        }
    }
    for (uint32_t r = 0; r < topology->num_ranks; r++) {
        if (nep_mapped_serves(loop, r)) {
            loop->windows[window].base[r] = (uint8_t *)(uintptr_t)cards[r].base;
        }
    }
    return NEP_OK;
}

static enum nep_status loop_window_create(struct nep_transport *transport, uint32_t window,
                                          void **base_p, size_t bytes)
{
    struct nep_mapped *loop = (struct nep_mapped *)transport;
    const struct nep_topology *topology = loop->params.topology;
    if (*base_p != NULL) {
        return nep_fail(NEP_ERR_UNSUPPORTED, "loop: a window over memory that exists");
    }
    uint8_t *base = NULL;
    struct loop_card *cards = calloc(topology->num_ranks, sizeof *cards);
    enum nep_status status = cards == NULL ? nep_fail(NEP_ERR_NO_MEMORY, "loop: no memory")
                                           : own_memory(loop, bytes, &base);
    if (status == NEP_OK) {
        status = nep_mapped_window_open(loop, window, bytes);
    }
    struct loop_card card = {process_cookie(), (uint64_t)(uintptr_t)base, bytes};
    if (status == NEP_OK) {
        status = nep_bootstrap_allgather(loop->params.bootstrap, &card, cards, sizeof card,
                                         loop->params.timeout_ns, "loop window");
        if (status != NEP_OK) {
            /* Some peers may have the address: let go of it as they would, never unmap it. */
            head_drop(base);
            base = NULL;
        } else {
            status = take_cards(loop, window, cards);
        }
        if (status != NEP_OK) {
            nep_mapped_window_free(loop, window);
        }
    }
    if (status == NEP_OK) {
        *base_p = base;
    } else if (base != NULL) {
        /* Nobody has it: take_cards refuses on every rank of a node alike. */
        munmap(base - HEAD_BYTES, HEAD_BYTES + bytes);
    }
    free(cards);
    return status;
}

static enum nep_status loop_peer_status(struct nep_transport *transport, uint32_t rank)
{
    (void)transport;
    (void)rank; /* a thread does not die alone */
    return NEP_OK;
}

static void loop_close(struct nep_transport *transport)
{
    struct nep_mapped *loop = (struct nep_mapped *)transport;
    nep_mapped_fini(loop);
    free(loop);
}

const struct nep_transport_ops nep_loop_ops = {
    .name = "loop",
    .caps = NEP_CAP_MAPPED | NEP_CAP_FABRIC | NEP_CAP_ORDERED | NEP_CAP_SILENT,
    .probe = loop_probe,
    .create = loop_create,
    .close = loop_close,
    .window_create = loop_window_create,
    .window_grant = nep_open_window_grant,
    .window_destroy = loop_window_destroy,
    .window_retire = loop_window_retire,
    .peer_window = nep_mapped_peer_window,
    .put = nep_mapped_put,
    .progress = nep_mapped_progress,
    .completed = nep_mapped_completed,
    .peer_status = loop_peer_status,
    .abandon = nep_unsupported_abandon,
    .stats = nep_mapped_stats,
};
