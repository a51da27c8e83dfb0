/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Connections, by addresses exchanged through the bootstrap. Rejected: librdmacm. It resolves
 * routes and chooses a GID by itself, but needs an IP address per port, one listener per process
 * and one handshake per QP pair, whereas one gather of a few bytes per QP connects all at once and
 * lets both ends see why a pair cannot be connected.
 *
 * Two exchanges: addresses, and then "all my QPs can receive", without which a first message would
 * meet a QP that drops it and cost a timeout.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "transport/bootstrap.h"
#include "transport/verbs/verbs.h"

/* What a rank says: its paths, then for every rank and QP the number of the QP meant for it. */
struct card {
    uint64_t key;
    struct nep_verbs_card paths[NEP_VERBS_MAX_PATHS];
    uint32_t qp_nums[]; /* [num_ranks * num_qps] */
};

/* Cards lie one behind another, so each begins where its key may. */
static size_t card_bytes(const struct nep_verbs *verbs)
{
    size_t bytes =
        sizeof(struct card) + (size_t)verbs->num_ranks * verbs->num_qps * sizeof(uint32_t);
    return (bytes + sizeof(uint64_t) - 1) / sizeof(uint64_t) * sizeof(uint64_t);
}

static const struct card *card_of(const struct nep_verbs *verbs, const uint8_t *cards,
                                  uint32_t rank)
{
    return (const struct card *)(cards + rank * card_bytes(verbs));
}

/* ---- QPs ------------------------------------------------------------------------------------ */

static enum nep_status make_qp(struct nep_verbs *verbs, struct nep_verbs_qp *qp, uint32_t path_idx)
{
    static const uint32_t inline_sizes[] = {256, 128, 64, 0};
    struct nep_verbs_path *path = &verbs->paths[path_idx];
    qp->path = path_idx;
    qp->put_of = calloc(verbs->put_mask + 1, sizeof *qp->put_of);
    if (qp->put_of == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "verbs: no memory for a send queue of %u", verbs->depth);
    }
    int error = 0;
    for (uint32_t i = 0; i < 4 && qp->qp == NULL; i++) {
        struct ibv_qp_init_attr attr = {.send_cq = path->cq,
                                        .recv_cq = path->cq,
                                        .srq = path->srq,
                                        .qp_type = IBV_QPT_RC,
                                        .cap = {.max_send_wr = verbs->depth,
                                                .max_send_sge = 1,
                                                .max_inline_data = inline_sizes[i]}};
        qp->qp = verbs->api.create_qp(path->pd, &attr);
        error = errno;
        qp->max_inline = inline_sizes[i];
    }
    if (qp->qp == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "verbs: %s: no QP with a send queue of %u: %s",
                        path->device, verbs->depth, strerror(error));
    }
    return NEP_OK;
}

static void table_add(struct nep_verbs_qp_table *table, uint32_t qp_num, uint32_t peer,
                      uint32_t qp_idx)
{
    uint32_t at = qp_num & table->mask;
    while (table->keys[at].peer != UINT32_MAX) {
        at = (at + 1) & table->mask;
    }
    table->keys[at] = (struct nep_verbs_qp_key){qp_num, peer, qp_idx};
}

static enum nep_status make_tables(struct nep_verbs *verbs)
{
    uint32_t size = 2; /* twice the entries, so that a search ends soon at an empty one */
    while (size < 2 * verbs->num_ranks * verbs->num_qps) {
        size *= 2;
    }
    for (uint32_t p = 0; p < verbs->num_paths; p++) {
        struct nep_verbs_qp_table *table = &verbs->paths[p].table;
        table->mask = size - 1;
        table->keys = calloc(size, sizeof *table->keys);
        if (table->keys == NULL) {
            return nep_fail(NEP_ERR_NO_MEMORY, "verbs: no memory for a table of %u QPs", size);
        }
        for (uint32_t i = 0; i < size; i++) {
            table->keys[i].peer = UINT32_MAX;
        }
    }
    return NEP_OK;
}

static enum nep_status make_qps(struct nep_verbs *verbs)
{
    enum nep_status status = make_tables(verbs);
    verbs->put_mask = 7;
    while (verbs->put_mask < verbs->depth) {
        verbs->put_mask = verbs->put_mask * 2 + 1;
    }
    for (uint32_t r = 0; status == NEP_OK && r < verbs->num_ranks; r++) {
        struct nep_verbs_peer *peer = &verbs->peers[r];
        if (!peer->is_served) {
            continue;
        }
        peer->qps = calloc(verbs->num_qps, sizeof *peer->qps);
        if (peer->qps == NULL) {
            return nep_fail(NEP_ERR_NO_MEMORY, "verbs: no memory for QPs");
        }
        for (uint32_t q = 0; status == NEP_OK && q < verbs->num_qps; q++) {
            status = make_qp(verbs, &peer->qps[q], q % verbs->num_paths);
            if (status == NEP_OK) {
                table_add(&verbs->paths[q % verbs->num_paths].table, peer->qps[q].qp->qp_num, r, q);
            }
        }
        peer->num_alive = peer->num_parts = verbs->num_qps;
    }
    return status;
}

/* ---- states --------------------------------------------------------------------------------- */

static enum ibv_mtu mtu_limit(const struct nep_config *config)
{
    enum ibv_mtu mtu = IBV_MTU_4096;
    while (config->verbs_mtu != UINT32_MAX && mtu > IBV_MTU_256 &&
           (128u << mtu) > config->verbs_mtu) {
        mtu--;
    }
    return mtu;
}

/* Where packets of an incarnation begin to count: far from those of any other. */
static uint32_t first_packet(const struct nep_verbs_qp *qp)
{
    return qp->incarnation * 0x9e3779u & 0xffffff;
}

static enum nep_status to_init(struct nep_verbs *verbs, const struct nep_verbs_qp *qp)
{
    const struct nep_verbs_path *path = &verbs->paths[qp->path];
    struct ibv_qp_attr init = {.qp_state = IBV_QPS_INIT,
                               .port_num = path->port,
                               .qp_access_flags = IBV_ACCESS_REMOTE_WRITE};
    int error = verbs->api.modify_qp(
        qp->qp, &init, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
    if (error != 0) {
        return nep_fail(NEP_ERR_IO, "verbs: %s: QP %u cannot be initialised: %s", path->device,
                        qp->qp->qp_num, strerror(error));
    }
    return NEP_OK;
}

/* The way to a rank's end of a path, of a GID that both have. */
static void fill_way(const struct nep_verbs *verbs, const struct nep_verbs_path *path,
                     const struct nep_verbs_card *remote, enum nep_verbs_gid_kind kind,
                     struct ibv_ah_attr *way)
{
    const struct nep_config *config = verbs->params.config;
    *way = (struct ibv_ah_attr){
        .dlid = remote->lid, .sl = (uint8_t)config->verbs_sl, .port_num = path->port};
    if (path->port_attr.link_layer == IBV_LINK_LAYER_ETHERNET) {
        way->is_global = 1;
        way->grh.sgid_index = (uint8_t)path->gids.index[kind];
        way->grh.hop_limit = 64; /* 1 works until somebody routes */
        way->grh.traffic_class = (uint8_t)config->verbs_tc;
        memcpy(way->grh.dgid.raw, remote->gids.raw[kind], 16);
    }
}

static enum nep_status to_receive(struct nep_verbs *verbs, uint32_t rank, uint32_t qp_idx)
{
    const struct nep_config *config = verbs->params.config;
    struct nep_verbs_qp *qp = &verbs->peers[rank].qps[qp_idx];
    struct nep_verbs_path *path = &verbs->paths[qp->path];
    const struct nep_verbs_card *remote = nep_verbs_card_of(verbs, rank, qp->path);
    enum nep_verbs_gid_kind kind;
    bool is_ethernet = path->port_attr.link_layer == IBV_LINK_LAYER_ETHERNET;
    if (path->port_attr.link_layer != remote->link_layer) {
        return nep_fail(NEP_ERR_MISMATCH,
                        "verbs: path %u: %s here and %s at rank %u have different link layers",
                        qp->path, path->device, remote->device, rank);
    }
    enum nep_status status = nep_verbs_gid_agree(&path->gids, &remote->gids, &kind);
    if (status != NEP_OK && is_ethernet) {
        return nep_fail_prefix(status, "path %u, %s to %s at rank %u: ", qp->path, path->device,
                               remote->device, rank);
    }
    enum ibv_mtu mtu = mtu_limit(config);
    mtu = path->port_attr.active_mtu < mtu ? path->port_attr.active_mtu : mtu;
    mtu = remote->mtu < mtu ? (enum ibv_mtu)remote->mtu : mtu;
    struct ibv_qp_attr attr = {
        .qp_state = IBV_QPS_RTR,
        .path_mtu = mtu,
        .dest_qp_num = qp->remote_num,
        .rq_psn = first_packet(qp),
        .max_dest_rd_atomic = 1,
        .min_rnr_timer = 1 /* 0.01 ms: a receive is missing for moments, or not at all */};
    fill_way(verbs, path, remote, kind, &attr.ah_attr);
    int error =
        verbs->api.modify_qp(qp->qp, &attr,
                             IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN |
                                 IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
    char here[48] = "", there[48] = "";
    if (is_ethernet) {
        nep_verbs_gid_text(path->gids.raw[kind], here);
        nep_verbs_gid_text(remote->gids.raw[kind], there);
    }
    if (error != 0) {
        return nep_fail(NEP_ERR_IO,
                        "verbs: QP %u of %s cannot be connected to QP %u of %s at rank %u (%s to "
                        "%s): %s; is there a route between them?",
                        qp->qp->qp_num, path->device, attr.dest_qp_num, remote->device, rank, here,
                        there, strerror(error));
    }
    nep_debug("verbs: rank %u QP %u: %s port %u to %s, %s %s (index %d) to %s, MTU %u", rank,
              qp_idx, path->device, path->port, remote->device,
              is_ethernet ? nep_verbs_gid_kind_name(kind) : "InfiniBand", here,
              is_ethernet ? path->gids.index[kind] : -1, there, 128u << mtu);
    return NEP_OK;
}

static enum nep_status to_send(struct nep_verbs *verbs, uint32_t rank, uint32_t qp_idx)
{
    const struct nep_config *config = verbs->params.config;
    struct nep_verbs_qp *qp = &verbs->peers[rank].qps[qp_idx];
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_RTS,
                               .sq_psn = first_packet(qp),
                               .timeout = (uint8_t)config->verbs_ack_timeout,
                               .retry_cnt = (uint8_t)config->verbs_retry,
                               .rnr_retry = (uint8_t)config->verbs_rnr_retry,
                               .max_rd_atomic = 1};
    int error =
        verbs->api.modify_qp(qp->qp, &attr,
                             IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT |
                                 IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC);
    if (error != 0) {
        return nep_fail(NEP_ERR_IO,
                        "verbs: QP %u of %s to rank %u cannot be made ready to send: %s",
                        qp->qp->qp_num, verbs->paths[qp->path].device, rank, strerror(error));
    }
    return NEP_OK;
}

enum nep_status nep_verbs_qp_start(struct nep_verbs *verbs, uint32_t rank, uint32_t qp_idx)
{
    enum nep_status status = to_init(verbs, &verbs->peers[rank].qps[qp_idx]);
    if (status == NEP_OK) {
        status = to_receive(verbs, rank, qp_idx);
    }
    return status == NEP_OK ? to_send(verbs, rank, qp_idx) : status;
}

/* ---- exchange ------------------------------------------------------------------------------- */

static void fill_card(const struct nep_verbs *verbs, struct card *card)
{
    card->key = verbs->key;
    for (uint32_t p = 0; p < verbs->num_paths; p++) {
        const struct nep_verbs_path *path = &verbs->paths[p];
        struct nep_verbs_card *out = &card->paths[p];
        memcpy(out->device, path->device, sizeof out->device);
        out->gids = path->gids;
        out->mtu = path->port_attr.active_mtu;
        out->link_layer = path->port_attr.link_layer;
        out->lid = path->port_attr.lid;
        out->port = path->port;
        out->door_port = path->door_port;
        out->knock_qp = path->knocks.qp == NULL ? 0 : path->knocks.qp->qp_num;
    }
    for (uint32_t r = 0; r < verbs->num_ranks; r++) {
        for (uint32_t q = 0; verbs->peers[r].is_served && q < verbs->num_qps; q++) {
            card->qp_nums[r * verbs->num_qps + q] = verbs->peers[r].qps[q].qp->qp_num;
        }
    }
}

/* What is kept of the cards, to connect now and again. */
static enum nep_status keep_cards(struct nep_verbs *verbs, const uint8_t *cards)
{
    verbs->keys = calloc(verbs->num_ranks, sizeof *verbs->keys);
    verbs->cards = calloc((size_t)verbs->num_ranks * verbs->num_paths, sizeof *verbs->cards);
    if (verbs->keys == NULL || verbs->cards == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "verbs: no memory for %u addresses", verbs->num_ranks);
    }
    for (uint32_t r = 0; r < verbs->num_ranks; r++) {
        const struct card *card = card_of(verbs, cards, r);
        verbs->keys[r] = card->key;
        memcpy(&verbs->cards[(size_t)r * verbs->num_paths], card->paths,
               verbs->num_paths * sizeof card->paths[0]);
        for (uint32_t q = 0; verbs->peers[r].is_served && q < verbs->num_qps; q++) {
            verbs->peers[r].qps[q].remote_num = card->qp_nums[verbs->rank * verbs->num_qps + q];
        }
    }
    return NEP_OK;
}

/* Now, while it can be resolved: later the link may be down. */
static void address_knocks(struct nep_verbs *verbs, uint32_t rank)
{
    for (uint32_t p = 0; p < verbs->num_paths; p++) {
        const struct nep_verbs_path *path = &verbs->paths[p];
        const struct nep_verbs_card *remote = nep_verbs_card_of(verbs, rank, p);
        enum nep_verbs_gid_kind kind = NEP_VERBS_GID_IB;
        struct ibv_ah_attr way;
        if (path->knocks.qp == NULL || remote->knock_qp == 0 ||
            (nep_verbs_gid_agree(&path->gids, &remote->gids, &kind) != NEP_OK &&
             path->port_attr.link_layer == IBV_LINK_LAYER_ETHERNET)) {
            continue;
        }
        fill_way(verbs, path, remote, kind, &way);
        verbs->peers[rank].ahs[p] = verbs->api.create_ah(path->pd, &way);
        if (verbs->peers[rank].ahs[p] == NULL) {
            nep_info("verbs: %s: no address of rank %u (%s): a connection that fails stays dead",
                     path->device, rank, strerror(errno));
        }
    }
}

static enum nep_status connect_all(struct nep_verbs *verbs, const uint8_t *cards)
{
    enum nep_status status = keep_cards(verbs, cards);
    for (uint32_t r = 0; status == NEP_OK && r < verbs->num_ranks; r++) {
        if (!verbs->peers[r].is_served) {
            continue;
        }
        for (uint32_t q = 0; status == NEP_OK && q < verbs->num_qps; q++) {
            status = nep_verbs_qp_start(verbs, r, q);
        }
        if (status == NEP_OK) {
            address_knocks(verbs, r);
        }
    }
    return status;
}

enum nep_status nep_verbs_connect(struct nep_verbs *verbs)
{
    const struct nep_transport_params *params = &verbs->params;
    size_t bytes = card_bytes(verbs);
    struct card *mine = calloc(1, bytes);
    uint8_t *cards = calloc(verbs->num_ranks, bytes);
    enum nep_status status = mine == NULL || cards == NULL
                                 ? nep_fail(NEP_ERR_NO_MEMORY,
                                            "verbs: no memory for %u cards of "
                                            "%zu bytes",
                                            verbs->num_ranks, bytes)
                                 : make_qps(verbs);
    status = nep_bootstrap_common(params->bootstrap, verbs->rank, verbs->num_ranks, status,
                                  params->timeout_ns);
    if (status == NEP_OK) {
        fill_card(verbs, mine);
        status = nep_bootstrap_allgather(params->bootstrap, mine, cards, bytes, params->timeout_ns,
                                         "verbs addresses");
        if (status == NEP_OK) {
            status = connect_all(verbs, cards);
        }
        /* Also the barrier: nobody sends before all can receive. */
        status = nep_bootstrap_common(params->bootstrap, verbs->rank, verbs->num_ranks, status,
                                      params->timeout_ns);
    }
    free(mine);
    free(cards);
    return status;
}

void nep_verbs_disconnect(struct nep_verbs *verbs)
{
    for (uint32_t r = 0; verbs->peers != NULL && r < verbs->num_ranks; r++) {
        struct nep_verbs_peer *peer = &verbs->peers[r];
        for (uint32_t q = 0; peer->qps != NULL && q < verbs->num_qps; q++) {
            if (peer->qps[q].qp != NULL) {
                verbs->api.destroy_qp(peer->qps[q].qp);
            }
            free(peer->qps[q].put_of);
        }
        free(peer->qps);
        peer->qps = NULL;
        nep_verbs_ask_end(peer);
        for (uint32_t p = 0; p < verbs->num_paths; p++) {
            if (peer->ahs[p] != NULL) {
                verbs->api.destroy_ah(peer->ahs[p]);
            }
        }
    }
    if (verbs->try_fd >= 0) {
        close(verbs->try_fd);
    }
    free(verbs->keys);
    free(verbs->cards);
}
