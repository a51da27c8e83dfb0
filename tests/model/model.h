/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A small model of nearep's protocol and an explorer of all its states. Nothing of the library is
 * used here: the model is written from docs/protocol.md, so that the two can disagree.
 *
 * What is in a state: how far every rank is in its calls, what every rank has read, staged and
 * summed, which messages are posted and which of them (and of their repeats) have not arrived, the
 * credits as sender and receiver know them. Contents of slots need not be stored: a slot holds the
 * newest tile that was written to it, and every write is checked at the moment it is posted, which
 * is the earliest moment at which its bytes may land.
 */
#ifndef NEP_TEST_MODEL_H
#define NEP_TEST_MODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    MAX_RANKS = 5,
    MAX_NODES = 3,
    MAX_LANES = 3,
    MAX_STREAMS = MAX_RANKS * (MAX_NODES - 1),
    MAX_OPS = 8,
    MAX_TILES = 24, /* of one stream over all operations */
    MAX_ACTIONS = 512,
    MAX_SEGMENTS = 128,
};

enum traffic {
    TRAFFIC_EVEN,   /* `tiles` tiles in every stream and operation */
    TRAFFIC_VARIED, /* 0 to `tiles`, different by stream and operation */
    TRAFFIC_QUIET,  /* dispatches as EVEN, combines without any row */
    TRAFFIC_BURST,  /* one tile, but `tiles` in the last operation of either kind */
};

/* Work a rank may do beyond the operation that its present call is about. */
enum ahead {
    AHEAD_NONE,   /* a call works on its own operation alone: the hardest case for liveness */
    AHEAD_CALLS,  /* any call works on everything that was sent */
    AHEAD_ALWAYS, /* also between calls: a thread of its own. The hardest case for safety */
};

struct params {
    const char *name;
    uint8_t ranks_on[MAX_NODES]; /* 0: no such node */
    uint8_t outstanding;         /* S */
    uint8_t slots;               /* W, of COUNTS; 0: 2S */
    uint8_t tile_slots;          /* V, of a stream; 0: W */
    const char *ops;             /* 'D' and 'C', in order */
    enum traffic traffic;
    uint8_t tiles; /* most tiles of one stream and operation */
    uint8_t ring;  /* staged chunks per (rank, source); 0: read in place */
    enum ahead ahead;
    bool joint;  /* a rank reads tile k of all its streams in one step: fewer states, later reads */
    bool delays; /* messages arrive in any order, at any time; else at once */
    bool repeats;        /* every put arrives twice, the second time at any later time */
    uint8_t credit_span; /* what CREDITs of a stream in flight at once may differ by */
    uint8_t imm_modulus; /* numbers in an immediate are known modulo this; 0: 256 */
    bool
        skip; /* lane l of a node needs tile q only if q mod G is l, and does not wait for others */
    bool credit_stale; /* the sender decodes CREDIT against its last CREDIT, not all it knows */
    bool imm_stale;    /* the receiver decodes against its last CREDIT, not against its readers */

    /* Rules switched off; each is there to be found missing. */
    bool no_r1;          /* combine completes with the COUNTS of its own lane alone */
    bool no_r2;          /* any number of operations outstanding */
    bool no_r3;          /* tiles go without credit */
    bool no_r4;          /* a slot's next put does not wait for the last one's completion */
    bool no_lend;        /* completes while neighbours still read the input */
    bool no_duty;        /* completes without having sent the credits that its sources need */
    bool no_implicit;    /* the sender has only explicit credits */
    bool credit_written; /* CREDIT writes the word; else the word takes the larger number */
    bool credit_burst;   /* any CREDITs of a stream in flight */
    bool credit_loose;   /* completes while a CREDIT of it is in flight */
    bool send_waits;     /* the send half waits until all its tiles are posted */
    bool credit_blind;   /* the receiver leaves out what COUNTS tell about implicit credit */
};

struct stream {
    uint8_t posted;                       /* tiles, in order */
    uint8_t credit;                       /* explicit, as the sender knows it */
    uint8_t said;                         /* explicit, as the receiver last sent it */
    uint32_t flight, again;               /* tiles not arrived; whose repeat has not arrived */
    uint32_t credit_flight, credit_again; /* CREDITs by their number */
};

struct state {
    uint8_t sent[MAX_RANKS], done[MAX_RANKS];
    uint8_t inside[MAX_RANKS];            /* in complete(done) */
    uint8_t home[MAX_RANKS];              /* operations whose own-node rows it has read */
    uint8_t sums[MAX_RANKS];              /* home sums of combine, in steps of one tile */
    uint8_t read[MAX_STREAMS][MAX_LANES]; /* tiles of a dispatch stream, by reader's lane */
    uint8_t staged[MAX_RANKS][MAX_RANKS]; /* chunks by (rank, source) */
    uint8_t counts_flight[MAX_RANKS][MAX_RANKS], counts_again[MAX_RANKS][MAX_RANKS];
    struct stream dispatch[MAX_STREAMS], combine[MAX_STREAMS];
};

/* Stream i joins source `src` and node `node` through the landing rank `far` on that node. */
struct link {
    uint8_t src, node, far;
};

struct model {
    struct params p;
    uint8_t num_ranks, num_nodes, num_streams, num_ops, slots, tile_slots;
    uint16_t modulus;
    uint8_t node[MAX_RANKS], lane[MAX_RANKS];
    uint8_t first[MAX_NODES + 1]; /* first rank of a node */
    uint8_t landing[MAX_RANKS][MAX_NODES];
    struct link links[MAX_STREAMS];
    uint8_t link_of[MAX_RANKS][MAX_NODES];
    bool told[MAX_OPS][MAX_RANKS][MAX_RANKS]; /* COUNTS of op go from rank to rank */
    /* Ends after op j stand at [j + 1]. */
    uint8_t dispatch_end[MAX_STREAMS][MAX_OPS + 1];
    uint8_t combine_end[MAX_STREAMS][MAX_OPS + 1];
    uint8_t home_end[MAX_RANKS][MAX_OPS + 1]; /* chunks that a source gets from each of its node */
    uint8_t sums_end[MAX_RANKS][MAX_OPS + 1];
    /* What a source has used up of stream / home chunks after a number of home sums. */
    uint8_t stream_used[MAX_STREAMS][MAX_TILES + 1];
    uint8_t home_used[MAX_RANKS][MAX_TILES + 1];
    struct {
        uint16_t offset, length;
    } segments[MAX_SEGMENTS];
    uint16_t num_segments, packed_bytes;
};

enum step {
    STEP_SEND,
    STEP_ENTER,
    STEP_FINISH,
    STEP_HOME,
    STEP_READ,
    STEP_READ_ALL,
    STEP_POST,
    STEP_STAGE,
    STEP_SUM_POST,
    STEP_HOME_SUM,
    STEP_CREDIT,
    STEP_ARRIVE_COUNTS,
    STEP_ARRIVE_TILE,
    STEP_ARRIVE_CREDIT,
};

struct action {
    uint8_t step;
    uint8_t rank;  /* who does it, or where it arrives from */
    uint8_t other; /* the other rank, or the stream */
    uint8_t info;  /* number; with bit 7: a repeat, with bit 6: of combine */
};
enum { INFO_REPEAT = 128, INFO_COMBINE = 64, INFO_NUMBER = 63 };

/* model.c: what the numbers mean. */
bool model_init(struct model *model, const struct params *params);
void model_pack(const struct model *model, const struct state *state, uint8_t *out);
void model_unpack(const struct model *model, const uint8_t *in, struct state *state);
uint8_t op_of(const uint8_t *end, uint8_t number); /* the operation of the number-th item */
bool counts_at_rank(const struct state *state, uint8_t from, uint8_t to, uint8_t op);
bool counts_on_node(const struct model *model, const struct state *state, uint8_t from,
                    uint8_t node, uint8_t op);
uint8_t dispatch_freed(const struct model *model, const struct state *state, uint8_t link);
uint8_t combine_freed(const struct model *model, const struct state *state, uint8_t link);
uint8_t ring_used(const struct model *model, const struct state *state, uint8_t rank,
                  uint8_t source);
/* The operations that a rank may work on: in its send half of op, or in what it is doing now. */
struct range {
    uint8_t from, to; /* to is excluded */
};
struct range range_in_send(const struct model *model, uint8_t op);
struct range range_now(const struct model *model, const struct state *state, uint8_t rank);
uint32_t model_measure(const struct model *model, const struct state *state);

/* enabled.c: which actions are possible. */
unsigned model_actions(const struct model *model, const struct state *state, struct action *out);
bool may_post(const struct model *model, const struct state *state, uint8_t link,
              struct range range);
bool may_sum_post(const struct model *model, const struct state *state, uint8_t link,
                  struct range range);
bool may_stage(const struct model *model, const struct state *state, uint8_t rank, uint8_t source,
               struct range range);
/* What the receiver of a stream may count as known to its sender. */
uint8_t credit_known(const struct model *model, const struct state *state, uint8_t link,
                     bool combine);
uint8_t dispatch_read_by_all(const struct model *model, const struct state *state, uint8_t link);
bool may_read(const struct model *model, const struct state *state, uint8_t rank, uint8_t link,
              struct range range);
bool may_read_home(const struct model *model, const struct state *state, uint8_t rank,
                   struct range range);
bool may_read_all(const struct model *model, const struct state *state, uint8_t rank);

/* steps.c: what an action does. NULL, or the sentence of the property that it breaks. */
const char *model_apply(const struct model *model, struct state *state, struct action action);
bool model_finished(const struct model *model, const struct state *state);
void model_print_action(const struct model *model, struct action action);

/* explore.c */
enum verdict { VERDICT_SAFE, VERDICT_VIOLATION, VERDICT_DEADLOCK, VERDICT_UNDECIDED };
struct result {
    enum verdict verdict;
    const char *broken;                    /* the sentence */
    uint64_t states, transitions, credits; /* credits: steps that send a CREDIT */
    uint32_t depth;
};
struct result model_explore(const struct model *model, uint64_t max_states, bool trace);

#endif
