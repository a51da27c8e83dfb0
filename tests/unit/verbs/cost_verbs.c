/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a tile costs the processor in the verbs transport: run by cost.sh under callgrind, which
 * counts instructions in the cost_ functions and not in the device_ ones that they call.
 * One thread drives both ranks, so that no count depends on who was first.
 *
 * usage: cost_verbs PATHS QPS SPLIT
 *   SPLIT 0: every tile goes whole by one QP; 1: every tile is split over all QPs.
 */
#include "tests/unit/verbs/world.h"

enum { STEPS = 50, TILES = 16, TILE_BYTES = 4096 }; /* the device copies, which takes time here */

static uint32_t num_tiles;
/* Written after a counted call, which must return to where the counting is switched. */
static volatile uint32_t last_call;

/* callgrind starts and stops counting where it enters these, so they are called in drive alone. */
__attribute__((noinline)) static int device_post_send(struct ibv_qp *qp, struct ibv_send_wr *wr,
                                                      struct ibv_send_wr **bad)
{
    int error = fake_post_send(qp, wr, bad);
    last_call = 1;
    return error;
}
__attribute__((noinline)) static int device_poll_cq(struct ibv_cq *cq, int max, struct ibv_wc *wc)
{
    int num = fake_poll_cq(cq, max, wc);
    last_call = 2;
    return num;
}
__attribute__((noinline)) static int
device_post_srq_recv(struct ibv_srq *srq, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
    int error = fake_post_srq_recv(srq, wr, bad);
    last_call = 3;
    return error;
}

/* Posting: a step's tiles to one node. */
__attribute__((noinline)) static void cost_post(struct seat *seat, const struct nep_put *puts)
{
    for (uint32_t i = 0; i < TILES; i++) {
        uint64_t number;
        seat->num_errors += seat->transport->ops->put(seat->transport, &puts[i], &number) != NEP_OK;
        seat->last_number[1] = number;
    }
}

/* Completion at the sender, arrival at the receiver: what its progress thread does. */
__attribute__((noinline)) static void cost_poll(struct seat *seat)
{
    nep_verbs_poll((struct nep_verbs *)seat->transport);
    last_call = 4;
}

static void drive(struct seat *seat)
{
    struct seat *other = &seat->world->seats[1];
    struct nep_verbs_peer *peer = &((struct nep_verbs *)seat->transport)->peers[1];
    struct nep_put puts[TILES];
    for (uint32_t i = 0; i < TILES; i++) {
        puts[i] = (struct nep_put){.dst = 1,
                                   .window = WINDOW,
                                   .offset = COUNTERS_BYTES + (size_t)i * SLOT_BYTES,
                                   .src = world_source(seat, 1, i),
                                   .len = TILE_BYTES,
                                   .imm = world_imm(i)};
    }
    for (uint32_t step = 0; step < STEPS; step++) {
        cost_post(seat, puts);
        num_tiles += TILES;
        uint64_t deadline_ns = nep_deadline_ns(20 * NEP_S);
        while ((atomic_load(&peer->completed) < seat->last_number[1] ||
                world_arrived(other, 0, TILES - 1) < step + 1) &&
               nep_left_ns(deadline_ns) > 0) {
            cost_poll(seat);
            cost_poll(other);
        }
    }
    for (uint32_t i = 0; i < TILES; i++) {
        seat->num_errors += world_arrived(other, 0, i) != STEPS;
    }
}

static void work(struct seat *seat)
{
    struct nep_verbs *verbs = (struct nep_verbs *)seat->transport;
    nep_verbs_progress_stop(verbs);
    verbs->api.post_send = device_post_send;
    verbs->api.poll_cq = device_poll_cq;
    verbs->api.post_srq_recv = device_post_srq_recv;
    pthread_barrier_wait(&seat->world->barrier);
    if (seat->rank == 0) {
        drive(seat);
    }
    pthread_barrier_wait(&seat->world->barrier);
}

int main(int argc, char **argv)
{
    static struct world world;
    const char *nothing[] = {NULL};
    if (argc != 4 || nep_config_load_from(&world.config, nothing) != NEP_OK) {
        fprintf(stderr, "usage: cost_verbs PATHS QPS SPLIT\n");
        return 2;
    }
    fake_reset(4);
    world.config.timeout_ns = 100 * NEP_S;
    world.config.verbs_paths = (uint32_t)atoi(argv[1]);
    world.config.verbs_qps = (uint32_t)atoi(argv[2]);
    world.config.verbs_split_bytes = atoi(argv[3]) != 0 ? 1 : UINT32_MAX;
    world_run(&world, 2, work);
    for (uint32_t r = 0; r < 2; r++) {
        if (world.seats[r].status != NEP_OK || world.seats[r].num_errors != 0) {
            fprintf(stderr, "rank %u: %u errors; %s\n", r, world.seats[r].num_errors,
                    world.seats[r].message);
            return 1;
        }
    }
    printf("tiles %u requests %llu\n", num_tiles, (unsigned long long)fake.num_posted);
    world_free(&world);
    return 0;
}
