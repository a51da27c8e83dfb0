/* SPDX-License-Identifier: Apache-2.0 */
/*
 * nearep: tokens near their experts. Dispatch and combine for expert-parallel mixture-of-experts.
 * (long because it is the whole interface in one header)
 *
 * Words. rank: one participant (a process or a thread). node: ranks that reach each other by load
 * and store. lane: the local index of a rank on its node. T: tokens of a call, M: most tokens of
 * any call, H: hidden size in elements, K: top-k, E: logical experts, L: slots per rank, R: ranks,
 * N: nodes. slot: a place for one expert on one rank; the physical slot number of slot l on rank r
 * is r * L + l. map: logical expert -> its copies (slots). home: the node whose ranks run a
 * request.
 *
 * Rules that hold for every call unless its comment says otherwise.
 * - Returns NEP_OK (0) or a negative status. On failure nep_last_message() of the calling thread
 * holds one sentence: what failed, where, and what to do. Outputs are written on success only.
 * - Structures that a caller fills start with `size`, the sizeof the structure it was compiled
 * with. Smaller is an older caller; larger is accepted if the tail is zero. In creation parameters
 * a zero field asks for the documented default; structures of single calls have no defaults.
 * - Sizes are in bytes where a name ends in _bytes, times in nanoseconds where it ends in _ns.
 * - No call ends the process or prints, except the log that NEP_LOG asks for. Every wait is bounded
 * by the communicator's timeout.
 * - nep_*_destroy(NULL) is fine. Destroying always returns within a bound and never waits for a
 * peer that is gone.
 * - An `ep` is used by one thread at a time; different ones, also of one communicator, at once.
 */
#ifndef NEAREP_H
#define NEAREP_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define NEP_API __attribute__((visibility("default")))
#else
#define NEP_API
#endif

#define NEP_VERSION_MAJOR 0
#define NEP_VERSION_MINOR 1
#define NEP_VERSION_PATCH 0

/* The library's version, major * 10000 + minor * 100 + patch. Any thread, any time. */
NEP_API uint32_t nep_version(void);
/* The same as text, static: "0.1.0". */
NEP_API const char *nep_version_string(void);

/* ---- status ------------------------------------------------------------------------------- */

/* Grouped by what is still usable after the failure. */
enum nep_status {
    NEP_OK = 0,
    /* the call was refused; nothing changed */
    NEP_ERR_INVALID = -1,     /* an argument is impossible */
    NEP_ERR_UNSUPPORTED = -2, /* right, but not here or not in this build */
    NEP_ERR_BUSY = -3,        /* too many operations outstanding, or still in use */
    NEP_ERR_NOT_FOUND = -4,   /* a key, a file or a name does not exist */
    NEP_ERR_FORMAT = -5,      /* a file or a message is damaged or of another version */
    NEP_ERR_OVERFLOW = -6,    /* an output is too small; the message has the needed size */
    NEP_ERR_NO_MEMORY = -7,   /* memory, shared memory or a locked-memory limit */
    NEP_ERR_IO = -8,          /* the system refused a file, socket or device operation */
    /* ranks disagree; the group cannot be made, or the operation cannot be done */
    NEP_ERR_MISMATCH = -20,
    /* the communicator is harmed: nep_comm_fault() names the culprit */
    NEP_ERR_TIMEOUT = -30,   /* a deadline passed; the peer may only be slow */
    NEP_ERR_PEER_LOST = -31, /* a peer is gone */
    NEP_ERR_BROKEN = -32,    /* used after such a failure, or after fork() in the child */
    /* a fault of nearep itself */
    NEP_ERR_INTERNAL = -40
};

/* The name of a status, static: "NEP_ERR_TIMEOUT". Any thread. */
NEP_API const char *nep_status_name(enum nep_status status);
/* The sentence of this thread's last failed call; "" if none. Valid until its next nearep call. */
NEP_API const char *nep_last_message(void);

/* ---- bootstrap and communicator ----------------------------------------------------------- */

/*
 * How ranks find each other before there is a transport. The functions are called by the thread
 * that calls nep_comm_create or nep_ep_create (allgather), and by any thread (put, get, cas). Each
 * returns 0, or another value on failure; all must return within timeout_ns.
 * - allgather: `bytes` bytes of every rank to every rank, in rank order; collective.
 * - put, get, cas: a store of small values that outlives a rank, one for each communicator; keys
 * begin with "nearep/". May be NULL, then faults are reported but not recovered from. get waits for
 * the key; *len_p is its size on return, at most cap. cas replaces the value when it equals
 * `expected` (a missing key equals the empty value) and returns the value that stands afterwards in
 * `result`.
 */
struct nep_bootstrap {
    size_t size;
    void *ctx;
    int (*allgather)(void *ctx, const void *in, void *out, size_t bytes, uint64_t timeout_ns);
    int (*put)(void *ctx, const char *key, const void *value, size_t len, uint64_t timeout_ns);
    int (*get)(void *ctx, const char *key, void *value, size_t cap, size_t *len_p,
               uint64_t timeout_ns);
    int (*cas)(void *ctx, const char *key, const void *expected, size_t expected_len,
               const void *desired, size_t desired_len, void *result, size_t cap, size_t *len_p,
               uint64_t timeout_ns);
};

struct nep_comm_params {
    size_t size;
    uint32_t rank;      /* this rank; used when num_ranks is not 0 */
    uint32_t num_ranks; /* 0: rank, size and address from the launcher's environment */
    const struct nep_bootstrap
        *bootstrap;         /* copied; its ctx must outlive the communicator. NULL: built in */
    const char *rendezvous; /* "host:port" of the built-in rendezvous; NULL: NEP_RENDEZVOUS */
    const uint32_t *ranks_per_node; /* emulate nodes of these sizes, in rank order; NULL: detect */
    uint32_t num_nodes;             /* entries of ranks_per_node */
    const char *intra; /* transport inside a node: "shm", "loop"; NULL or "auto": choose */
    const char
        *inter; /* between nodes: "shm", "loop", "ucx", "verbs", "adversary:..."; NULL: choose */
    uint64_t timeout_ns; /* deadline of every wait; 0: NEP_TIMEOUT (100 s) */
    /*
     * 1: this process takes the seat of a rank that was lost. nep_comm_create is then not
     * collective; make the ep objects next, as the members made theirs, then call nep_comm_recover,
     * which they call too. Until then nothing else works.
     */
    uint32_t joins;
};

struct nep_comm;

/*
 * Makes this rank's seat in a group. Collective: all ranks call it with equal parameters (rank
 * apart); wrong sizes, duplicate ranks, other versions and other configurations are found and named
 * on every rank. Bounded by timeout_ns. Any thread.
 */
NEP_API enum nep_status nep_comm_create(const struct nep_comm_params *params,
                                        struct nep_comm **comm_p);
/* Frees it. Not collective. All its `ep`, handles and buffers must be destroyed before. */
NEP_API void nep_comm_destroy(struct nep_comm *comm);

/* Where ranks are. The arrays have num_ranks (or num_nodes) entries, belong to the communicator. */
struct nep_topology {
    size_t size;
    uint32_t num_ranks;
    uint32_t num_nodes;
    uint32_t rank;
    uint32_t node;                 /* of this rank */
    uint32_t local;                /* of this rank: its lane */
    const uint32_t *node_of_rank;  /* [num_ranks]; nodes are numbered by their lowest rank */
    const uint32_t *local_of_rank; /* [num_ranks]; ascending by rank inside a node */
    const uint32_t *node_ranks;    /* [num_nodes]: ranks on each node */
};

/* Any thread. */
NEP_API enum nep_status nep_comm_topology(const struct nep_comm *comm,
                                          struct nep_topology *topology_p);

/* What went wrong, for programs. `message` is the sentence for people. */
struct nep_fault {
    size_t size;
    enum nep_status status;
    uint32_t rank;     /* the culprit; UINT32_MAX when no single rank is */
    uint32_t node;     /* its node, or UINT32_MAX */
    uint64_t op;       /* the operation that waited */
    uint64_t expected; /* how many arrivals were expected */
    uint64_t arrived;  /* how many came */
    uint64_t idle_ns;  /* time since the last progress */
    char phase[32];    /* "counts", "tiles", "push", "credit", ... */
    char message[512];
};

/*
 * The first fault of this communicator, also one that a background thread found. NEP_OK and
 * fault_p->status == NEP_OK when there is none. Any thread.
 */
NEP_API enum nep_status nep_comm_fault(const struct nep_comm *comm, struct nep_fault *fault_p);

/*
 * After a fault: who lives is agreed on, and the communicator goes on with those. Collective over
 * all who live; nobody else of this communicator's may be inside a call. Also without a fault, to
 * let newcomers in. docs/faults.md has an example.
 *
 * - Ranks keep their numbers. A member that does not come within timeout_ns, is known to have
 * ended, or is blamed by the fault and not here when all others are, is out for good: its seat can
 * be taken by a newcomer, and nothing that it still sends reaches anybody.
 * - Operations that were under way failed. Handles stay, but hold no dispatch: dispatch again.
 *   Buffers stay with what is in them; those of the pool are private memory from now on, so rows
 *   take one more copy: free them and allocate anew to be fast.
 * - Experts with a copy on a rank that lives are reached through it by the next dispatch. Tokens
 * lose the others: nep_tokens_out.present says what is left of each.
 * - A newcomer waits timeout_ns for the members to come, longer only while they prepare for it.
 * - Fails with NEP_ERR_UNSUPPORTED without a store (put, get, cas of the bootstrap), with
 *   NEP_ERR_PEER_LOST when the others decided without this rank. After another failure (one more
 *   rank was lost meanwhile) it may be called again.
 */
struct nep_recover_params {
    size_t size;
    const uint8_t *is_lost; /* [num_ranks] 1: known to be gone, not waited for; NULL: nobody */
    uint32_t num_joining;   /* newcomers to wait for; others are let in if they are there */
    uint64_t timeout_ns;    /* 0: the communicator's */
};
struct nep_recovery {
    size_t size;
    uint64_t generation; /* how often it was decided who lives */
    uint32_t num_live;
    uint32_t was_prepared;  /* 1: what nep_comm_grow_begin began was taken, nothing was made anew */
    const uint8_t *is_live; /* [num_ranks], belongs to the communicator */
};
/* params and recovery_p may be NULL. */
NEP_API enum nep_status nep_comm_recover(struct nep_comm *comm,
                                         const struct nep_recover_params *params,
                                         struct nep_recovery *recovery_p);
/*
 * How many newcomers wait to be let in by nep_comm_recover. Asks the store, about a millisecond for
 * each empty seat; any one rank may ask and tell the others.
 */
NEP_API enum nep_status nep_comm_newcomers(struct nep_comm *comm, uint32_t *num_p);

/*
 * Lets newcomers in without standing still: all members call nep_comm_grow_begin, each when it
 * comes to it, and go on with their operations while a thread of the communicator makes transports,
 * windows and plans of the larger group beside those in use. When nep_comm_grow_ready has said so
 * on all members they call nep_comm_recover, between two operations of theirs on which they agree:
 * it changes over, for the price of an agreement through the store. The newcomer calls
 * nep_comm_recover alone, as ever.
 *
 * - Needs memory for two sets of windows meanwhile, and a store whose functions any thread may
 * call.
 * - Not prepared, when it comes to it: a fault was found, an ep was created or destroyed after
 *   nep_comm_grow_begin, an operation was under way, or a member was not ready within a second.
 *   Then nep_comm_recover makes everything anew while all wait, newcomers included.
 * - A newcomer that ends meanwhile harms nobody: nep_comm_grow_ready fails, or nep_comm_recover
 *   returns half a second later with the group as it was. Begin again with the next one.
 */
struct nep_grow_params {
    size_t size;
    uint32_t num_joining; /* newcomers to wait for, at least 1 (1) */
};
/*
 * Does not block. What was being prepared before is dropped. All members call it equally often
 * between two nep_comm_recover. params may be NULL: one newcomer. NEP_ERR_INVALID: fewer seats are
 * empty; otherwise refuses as nep_comm_recover does, and after a fault.
 */
NEP_API enum nep_status nep_comm_grow_begin(struct nep_comm *comm,
                                            const struct nep_grow_params *params);
/*
 * *is_ready_p: 1 when this member has all that the larger group needs, else 0. Fails when it is not
 * going to have: a newcomer ended, or did not come within the communicator's timeout. The group is
 * not harmed. NEP_ERR_NOT_FOUND: nothing is being prepared.
 */
NEP_API enum nep_status nep_comm_grow_ready(struct nep_comm *comm, uint32_t *is_ready_p);

/*
 * Writes what happened last on this rank's wire (calls, waits, posts, arrivals, faults: the last
 * NEP_TRACE_EVENTS of them) as trace JSON for Perfetto or chrome://tracing, on rank 0's clock (the
 * lowest live rank's, after recovery), with the error's bound in its head. In path %r becomes the
 * rank, %p the process id, %h the host; a temporary file is renamed into place. NEP_TRACE does it
 * at a fault and at the end by itself; nep-info --merge-traces joins the files of ranks. Also of a
 * communicator that broke. Any thread, but not during nep_comm_recover.
 */
NEP_API enum nep_status nep_comm_dump_events(struct nep_comm *comm, const char *path);

/* ---- one MoE shape on a communicator ------------------------------------------------------ */

enum nep_dtype {
    NEP_DTYPE_DEFAULT = 0, /* bf16 */
    NEP_DTYPE_BF16 = 1,
    NEP_DTYPE_FP16 = 2,
    NEP_DTYPE_FP32 = 3,
    NEP_DTYPE_FP8_E4M3 = 4, /* with one scale per 128 channels */
    NEP_DTYPE_OPAQUE = 5    /* row_bytes + scale_bytes pass through; no combine of its own */
};

/* How the scale of a block of 128 fp8 channels is stored. With s = max(amax, 1e-4) / 448: */
enum nep_scale {
    NEP_SCALE_FP32 = 0, /* float s */
    NEP_SCALE_POW2 = 1, /* float, s rounded up to a power of two */
    NEP_SCALE_UE8M0 = 2 /* uint8_t, the biased exponent of that power of two */
};

/* Where dispatch's outputs have the scales of their rows. */
enum nep_scale_order {
    NEP_SCALES_ROWS = 0, /* [capacity] rows of scales */
    /*
     * Columns of pieces of 4 bytes (a float, or four exponents), as matrix multiplies load them: an
     * output of N = capacity rows has [S][C] pieces, C = N rounded up to 4, piece s of row i at
     * s * C + i. The padded and the front layout have such a matrix for each local slot, N = R * M:
     * [L][S][C]. What lies between column and C is not written. Inputs keep rows.
     */
    NEP_SCALES_COLUMNS = 1
};

/* The output of dispatch. */
enum nep_layout {
    NEP_LAYOUT_DEFAULT = 0, /* NEP_LAYOUT_EXPERT_PACKED */
    NEP_LAYOUT_RANK = 1,    /* one row per token that this rank needs, by source rank, then token */
    NEP_LAYOUT_EXPERT_PACKED =
        2, /* rows grouped by local slot, inside by source rank, then token */
    NEP_LAYOUT_EXPERT_PADDED = 3, /* slot l, source r, i-th row at (l * R + r) * M + i */
    /* slot l's rows from l * R * M on, by source rank, then token, without gaps: packed rows at
     * places that are known before the counts */
    NEP_LAYOUT_EXPERT_FRONT = 4
};

/* Where tokens live, and what moves them. */
enum nep_executor {
    NEP_EXECUTOR_DEFAULT = 0, /* NEP_EXECUTOR_HOST */
    NEP_EXECUTOR_HOST = 1,    /* host memory; this library's threads */
    /*
     * Memory of the CUDA device that is current when the ep is created; kernels on the caller's
     * stream (a cudaStream_t as void *, NULL: the default stream). Arrays of single calls are in
     * device memory then, unless their comment says host. Calls return when their kernels are
     * launched; what a kernel gives up for is told by nep_comm_fault and by later calls. All may be
     * captured into a graph, except nep_dispatch_counts; a graph keeps the pointers, the number of
     * tokens and the map that it was captured with, and routing may change between replays. An ep's
     * calls are ordered on the device as they were made, by one stream or by events. Over several
     * nodes: at most 64 ranks on 16 nodes.
     */
    NEP_EXECUTOR_CUDA = 2
};

struct nep_map;

struct nep_ep_params {
    size_t size;
    uint32_t num_experts;    /* E; required */
    uint32_t slots_per_rank; /* L; 0: the map's, else ceil(E / R) */
    uint32_t top_k;          /* K, 1 to 32; required */
    uint32_t hidden;         /* H, a multiple of 16; required */
    uint32_t max_tokens;     /* M; required; ranks may pass fewer per call */
    enum nep_dtype dtype;    /* of inputs, expert outputs and results */
    enum nep_dtype wire;     /* of dispatched rows; 0: dtype */
    enum nep_layout layout;
    uint32_t
        expert_alignment; /* each slot's first row is a multiple of this (packed layout); 0: 1 */
    uint32_t outstanding; /* S: operations between send and complete at once, 1 to 8; 0: 1 */
    uint32_t num_layers; /* layers that share this ep, each with its table of the map; 0: the map's,
                            else 1 */
    const struct nep_map *map; /* NULL: contiguous; kept by reference until replaced or destroyed */
    uint64_t pool_bytes;       /* memory for nep_buffer_alloc; 0: NEP_POOL */
    enum nep_scale scale;      /* where wire is NEP_DTYPE_FP8_E4M3 */
    uint32_t row_bytes;        /* where wire is NEP_DTYPE_OPAQUE: of a dispatched row */
    uint32_t scale_bytes;      /* where wire is NEP_DTYPE_OPAQUE: of its scales, may be 0 */
    enum nep_executor executor;
    uint32_t num_sms; /* executor cuda: SMs of this rank's kernels; 0: 16, or its share of a device
                         that ranks share; more than all ranks' kernels fit: refused */
    uint64_t staging_bytes; /* executor cuda: for expert outputs (over several nodes also outputs of
                               dispatch) outside of nep_buffer_alloc's memory; 0: NEP_STAGING */
    enum nep_scale_order scale_order; /* of outputs; columns need whole pieces of 4 bytes */
};

struct nep_ep;

/* Collective: equal parameters on all ranks; a difference names the field and the ranks. */
NEP_API enum nep_status nep_ep_create(struct nep_comm *comm, const struct nep_ep_params *params,
                                      struct nep_ep **ep_p);
/* Not collective. All its handles and buffers must be destroyed before. */
NEP_API void nep_ep_destroy(struct nep_ep *ep);

/* What a shape costs per rank, in bytes; the parts add up to region_bytes. docs/memory.md has the
 * formula. */
struct nep_memory {
    size_t size;
    uint64_t region_bytes;  /* mapped on the node and, the landing parts, on the fabric; without the
                               pool */
    uint64_t control_bytes; /* words and COUNTS */
    uint64_t dispatch_landing_bytes; /* tiles from other nodes */
    uint64_t combine_landing_bytes;  /* partial sums from other nodes */
    uint64_t send_bytes;             /* packed tiles on their way out */
    uint64_t home_bytes;             /* tiles read by ranks of this node */
    uint64_t staging_bytes;          /* expert outputs that lie in private memory */
    uint64_t handle_bytes;           /* of each handle, private memory */
};

/* No communicator needed: topology is what the group will be. Any thread. */
NEP_API enum nep_status nep_ep_memory(const struct nep_ep_params *params,
                                      const struct nep_topology *topology,
                                      struct nep_memory *memory_p);

/*
 * Memory that the ranks of this node map, from the pool of an ep: rows in it move once. Aligned to
 * 4096 bytes, zeroed; device memory where the executor is cuda. When the pool is exhausted, private
 * memory is returned, said once in the log; it works, with one more copy. Owned by the ep; free it
 * with nep_buffer_free. Not on the path of a token.
 */
NEP_API enum nep_status nep_buffer_alloc(struct nep_ep *ep, size_t bytes, void **buffer_p);
NEP_API void nep_buffer_free(struct nep_ep *ep, void *buffer);

/*
 * Memory of the caller's own that the ranks of the node are to reach, so that rows in it move once,
 * as they do in memory of nep_buffer_alloc: any part of it may then be an input, an output or
 * expert outputs.
 *
 * Other processes can map a file and nothing else. So fd is that of memory made by memfd_create (of
 * huge pages too) or shm_open and mapped MAP_SHARED, for reading and writing; where in the file it
 * lies is looked up. The library needs fd during the call alone. Memory without a file (fd -1: from
 * malloc, or a framework's) works where all ranks of every node are threads of one process; else it
 * is refused with NEP_ERR_UNSUPPORTED, on every rank: use nep_buffer_alloc. Between nodes rows
 * travel in tiles of the ep's own, whatever memory they come from; no fabric needs this call.
 */
struct nep_buffer_params {
    size_t size;
    void *base;   /* NULL and 0 bytes: this rank takes part and has nothing */
    size_t bytes; /* may differ between ranks, 0 too */
    int fd;
};
/*
 * Collective over the ep's ranks, which register and deregister in the same order (found and named
 * when they do not), with no operation outstanding (NEP_ERR_BUSY). A failure of one rank is a
 * failure on all, and changes nothing. *buffer_p: the number of the buffer. The memory must stay
 * mapped, and the file as long as it is, until it is deregistered or the ep is destroyed;
 * nep_comm_recover deregisters all, and a rank that was lost but still runs may keep its mapping:
 * register other memory then if it must not be written. Executor cuda: NEP_ERR_UNSUPPORTED. Not on
 * the path of a token.
 */
NEP_API enum nep_status
nep_buffer_register(struct nep_ep *ep, const struct nep_buffer_params *params, uint32_t *buffer_p);
/* Every rank calls it; waits for nobody. No operation may be outstanding here (NEP_ERR_BUSY). */
NEP_API enum nep_status nep_buffer_deregister(struct nep_ep *ep, uint32_t buffer);

/* ---- handles, dispatch, combine ----------------------------------------------------------- */

/* Where the rows of one dispatch went. Made ahead; reusable; one dispatch at a time. */
struct nep_handle;

/* All memory here. Ranks may create and destroy handles in any order; what they use in one
 * operation must hold the same dispatch, which is checked. */
NEP_API enum nep_status nep_handle_create(struct nep_ep *ep, struct nep_handle **handle_p);
NEP_API void nep_handle_destroy(struct nep_handle *handle);

enum nep_id_type { NEP_IDS_INT32 = 0, NEP_IDS_INT64 = 1 };

/* The tokens of one call. Arrays are the caller's until the operation completes. */
struct nep_tokens {
    size_t size;
    uint32_t num_tokens; /* T, 0 to M */
    uint32_t layer;      /* which table of the map, 0 to num_layers - 1 */
    /* [T][H] of dtype; of fp8 where scales are given; [T][row_bytes] where the wire is opaque */
    const void *x;
    /* [T][ceil(H / 128)] of the ep's scale kind, or [T][scale_bytes]; NULL: none, or cast here */
    const void *scales;
    /* [T][K] logical experts, -1 = unused; NULL: the routing that this handle holds */
    const void *topk_ids;
    enum nep_id_type id_type;
    const float *topk_weights; /* [T][K]; NULL: all 1, or those that come with the routing held */
    /* for the recorder: [T] the request of each token; NULL: these tokens are not recorded */
    const uint64_t *request_keys;
    const uint8_t *is_prefill; /* beside it: [T] 1 = of the prompt; NULL: unknown */
};

/* Outputs of dispatch on this rank. Optional arrays may be NULL. rows = nep_counts.num_rows. On a
 * GPU x and what peers store are aligned to 16 bytes. */
struct nep_rows {
    size_t size;
    void *x;           /* [capacity][H] of the wire type, or [capacity][row_bytes] */
    uint64_t capacity; /* rows that fit; less than needed: NEP_ERR_OVERFLOW with the number */
    void *scales; /* nep_scale_order of [capacity], where the wire type has some; required then */
    int32_t *topk_slots; /* rank layout: [capacity][K] local slot, -1 = the expert is elsewhere */
    /* rank layout: [capacity][K], 0 where the slot is -1; expert layouts: [capacity] */
    float *topk_weights;
    uint32_t *source_rank;  /* [capacity] */
    uint32_t *source_token; /* [capacity] */
};

/* Sizes of what a dispatch brings this rank. The arrays belong to the handle until its next use. */
struct nep_counts {
    size_t size;
    /*
     * Rows of the output, padding included. Packed: each slot's rows fill up to the alignment, the
     * last one's too. Padded, front: L * R * M.
     */
    uint64_t num_rows;
    uint64_t num_real_rows;        /* rows that carry a token */
    const uint32_t *rows_per_slot; /* [L] real rows of each local slot */
    const uint64_t *first_row;     /* [L] where each slot's rows start (expert layouts) */
    /* [R] rank layout: rows from each rank; expert layouts: (token, slot) pairs */
    const uint32_t *rows_per_source;
};

/* The expert outputs that combine reads: same rows as the dispatch output. */
struct nep_expert_rows {
    size_t size;
    /* [num_rows][H] of dtype; rank layout: already weighted and summed over local experts */
    const void *y;
    /* rank layout: [num_rows][K] to be summed over ranks; all ranks pass it, or none */
    const float *topk_weights;
    /*
     * Expert layouts, one node: [T][K] weights of this rank's own tokens for this sum, in place of
     * those of the dispatch, which stay in the handle; nothing is sent for it. All ranks pass it
     * (also with T = 0), or none. As it is until nep_combine_recv returns (executor cuda: until
     * that half has run).
     */
    const float *token_weights;
};

/* The result, in token order. */
struct nep_tokens_out {
    size_t size;
    uint32_t num_tokens; /* T of the dispatch; checked */
    void *y;             /* [T][H] of dtype; a token without experts becomes zeros (plus bias) */
    const void *bias[2]; /* [T][H] of dtype each, added at home before the nodes' sums; or NULL */
    float
        *topk_weights; /* [T][K] sums of the rows' topk_weights, where those were passed; or NULL */
    /*
     * [T] what is in y: expert layouts: the sum of the weights of the experts that were reached (k
     * ascending); rank layout: the number of ranks. Less than asked for where experts were lost. Or
     * NULL.
     */
    float *present;
};

/*
 * Starts a dispatch: route, layout, COUNTS to every node, and the tiles that credits allow now.
 * Never waits for another node. NEP_ERR_BUSY when S operations are outstanding: complete one first.
 * An id out of range is NEP_ERR_INVALID with token, k and value, and nothing is sent (executor
 * cuda: a fault of the communicator, since a kernel finds it). stream: NULL on host memory.
 */
NEP_API enum nep_status nep_dispatch_send(struct nep_ep *ep, struct nep_handle *handle,
                                          const struct nep_tokens *in, void *stream);
/* Waits (bounded) until every rank's counts are here. Optional before nep_dispatch_recv. The arrays
 * are on the host. */
NEP_API enum nep_status nep_dispatch_counts(struct nep_ep *ep, struct nep_handle *handle,
                                            struct nep_counts *counts_p);
/*
 * Executor cuda: the same arrays in device memory, without a wait. They are valid as long as the
 * handle and are filled by each of its dispatches, in stream order. num_rows: the most that any
 * dispatch can bring, unless nep_dispatch_counts was called for this one.
 */
NEP_API enum nep_status nep_dispatch_counts_device(struct nep_ep *ep, struct nep_handle *handle,
                                                   struct nep_counts *counts_p);
/*
 * Optional, before nep_dispatch_send: the outputs of this handle's dispatches from now on, which
 * nep_dispatch_recv must then name again. With the CUDA executor the send half then moves the rows
 * already; without, the complete half does. NULL: bound no more.
 */
NEP_API enum nep_status nep_handle_bind_output(struct nep_handle *handle,
                                               const struct nep_rows *out);
/* Completes it: all rows are in `out`. Waits, bounded. */
NEP_API enum nep_status nep_dispatch_recv(struct nep_ep *ep, struct nep_handle *handle,
                                          const struct nep_rows *out, void *stream);
/*
 * Sends the expert outputs back and sums them per token: y[t] = sum over k of weight[t][k] *
 * expert(t, k) (expert layouts; a weight of 0 leaves the row out, also one of NaN), or the sum of
 * the ranks' rows (rank layout). fp32, fixed order, rounded once per level: rank (k ascending),
 * node (ranks ascending), home (nodes ascending); the same bits on every transport. `in->y` must
 * stay as it is until nep_combine_recv returns.
 */
NEP_API enum nep_status nep_combine_send(struct nep_ep *ep, struct nep_handle *handle,
                                         const struct nep_expert_rows *in, void *stream);
NEP_API enum nep_status nep_combine_recv(struct nep_ep *ep, struct nep_handle *handle,
                                         const struct nep_tokens_out *out, void *stream);

/* Flags by which whoever writes expert outputs says how far it is. */
struct nep_written {
    size_t size;
    /* [L][flags_per_slot]; each is raised when its rows are written (release, of the device's scope
     * on a GPU), and only grows meanwhile */
    const uint32_t *flags;
    uint32_t flags_per_slot; /* 1 or more */
    /* flag i of a slot is for its rows [i * this, (i + 1) * this), as received; 0: for all */
    uint32_t rows_per_flag;
    uint32_t least; /* the rows are written when their flag has this value or more */
};
/*
 * Expert layouts, before nep_combine_send: waits, bounded, until the flags say that the outputs for
 * all rows of this handle's dispatch are written. Flags of rows that were not received are not
 * looked at. Executor cuda: the stream waits, in a kernel of one block, beside which what writes
 * must be able to run; this returns when it is launched.
 */
NEP_API enum nep_status nep_combine_await(struct nep_ep *ep, struct nep_handle *handle,
                                          const struct nep_written *written, void *stream);

/* Both halves in one call. */
NEP_API enum nep_status nep_dispatch(struct nep_ep *ep, struct nep_handle *handle,
                                     const struct nep_tokens *in, const struct nep_rows *out,
                                     void *stream);
NEP_API enum nep_status nep_combine(struct nep_ep *ep, struct nep_handle *handle,
                                    const struct nep_expert_rows *in,
                                    const struct nep_tokens_out *out, void *stream);

/* Route and layout alone, without sending anything (DeepEP's get_dispatch_layout). Optional arrays
 * may be NULL. */
struct nep_layout_counts {
    size_t size;
    uint32_t *rows_per_rank;   /* [R] tokens that go to each rank */
    uint32_t *rows_per_node;   /* [N] tokens that go to each node */
    uint32_t *rows_per_slot;   /* [R * L] (token, k) pairs per physical slot */
    uint8_t *is_token_in_rank; /* [T][R] 0 or 1 */
    uint32_t *topk_slots;      /* [T][K] physical slot of each id, UINT32_MAX = unused */
    void *stream;              /* executor cuda */
};
NEP_API enum nep_status nep_ep_layout(struct nep_ep *ep, const struct nep_tokens *in,
                                      const struct nep_layout_counts *counts);

/* Counters since creation; this rank's view. Rows and bytes that it sent. */
struct nep_stats {
    size_t size;
    uint64_t dispatches;
    uint64_t combines;
    uint64_t tokens;       /* tokens dispatched */
    uint64_t tokens_local; /* of them, those whose experts are all on their node */
    uint64_t remote_rows;  /* rows sent to other nodes by dispatch: one per (token, remote node) */
    uint64_t remote_rows_back; /* rows sent to other nodes by combine */
    uint64_t wire_bytes;       /* sent to other nodes, both ways, headers included */
    uint64_t wire_messages;    /* puts posted to other nodes */
    uint64_t intra_bytes;      /* payload bytes moved between ranks of this node */
    uint64_t duplicates;       /* arrivals seen twice, dropped */
    uint64_t stale;            /* arrivals of another generation or operation, dropped */
    uint64_t wait_ns;          /* time in waits without progress */
};
/* Header bytes in wire_bytes follow from docs/protocol.md: wire_bytes - headers = rows * row bytes,
 * exactly. */
NEP_API enum nep_status nep_ep_stats(const struct nep_ep *ep, struct nep_stats *stats_p);

/* Deadline of the waits of later calls of this ep; 0: the communicator's again. */
NEP_API enum nep_status nep_ep_set_timeout(struct nep_ep *ep, uint64_t timeout_ns);
/*
 * After nep_comm_recover: *first_op_p is the first operation that some rank had not completed: what
 * is to be done again, by all; *next_op_p is the number that the next operation gets.
 */
NEP_API enum nep_status nep_ep_resume(const struct nep_ep *ep, uint64_t *first_op_p,
                                      uint64_t *next_op_p);

/* What this rank waited for, and how long. */
struct nep_wait_stat {
    char phase[32];   /* "counts", "tiles", "credit", ... */
    uint32_t rank;    /* of whom */
    uint64_t num;     /* waits that did not end at once */
    uint64_t wait_ns; /* in all of them */
    uint64_t longest_ns;
};
/* Those that were not 0, since creation; *num_p: how many there are. NEP_ERR_OVERFLOW when more
 * than cap. */
NEP_API enum nep_status nep_ep_waits(const struct nep_ep *ep, struct nep_wait_stat *stats,
                                     uint32_t cap, uint32_t *num_p);

/*
 * The counters of all ep objects of this communicator, its waits and its state as Prometheus text
 * (docs/tracing.md), with a zero behind it. *len_p: bytes of the text, also when NEP_ERR_OVERFLOW
 * says that cap is not more than that; about 4 KiB and 200 for each (ep, phase, rank) waited for.
 * While no other thread is inside a call on these ep objects: the thread that runs them writes the
 * text, a server's thread hands it out.
 */
NEP_API enum nep_status nep_comm_metrics(const struct nep_comm *comm, char *to, size_t cap,
                                         size_t *len_p);

/* ---- traces of routing -------------------------------------------------------------------- */

/* Which experts a router picked, for every token of a set of requests; the format of the file is in
 * docs/formats.md. A trace is immutable; any number of threads may read one. */
struct nep_trace;

struct nep_trace_shape {
    size_t size;
    uint32_t num_layers;
    uint32_t num_experts;
    uint32_t top_k;
    uint32_t num_requests;
    uint32_t num_domains;
    uint64_t num_tokens;
};

#define NEP_TRACE_NO_BOUNDARY 1u /* where decode starts was not recorded: prefill_tokens is 0 */

struct nep_trace_request {
    uint32_t domain;
    uint32_t prefill_tokens;
    uint32_t decode_tokens;
    uint32_t flags;
    uint64_t first_token; /* prefill first, then decode, contiguous */
};

/* Maps a .nept file and checks all of it: sizes, CRC, every id, every request. NEP_ERR_FORMAT names
 * what is wrong and where. The file must not shrink while it is open. */
NEP_API enum nep_status nep_trace_open(const char *path, struct nep_trace **trace_p);
NEP_API void nep_trace_close(struct nep_trace *trace);
NEP_API enum nep_status nep_trace_get_shape(const struct nep_trace *trace,
                                            struct nep_trace_shape *shape_p);
/* Names belong to the trace. "" for an index out of range. */
NEP_API const char *nep_trace_model(const struct nep_trace *trace);
NEP_API const char *nep_trace_domain(const struct nep_trace *trace, uint32_t domain);
/* NULL for an index out of range. */
NEP_API const struct nep_trace_request *nep_trace_request_at(const struct nep_trace *trace,
                                                             uint32_t idx);
/* ids of one token and layer, in range: [top_k], -1 = none. */
NEP_API void nep_trace_ids(const struct nep_trace *trace, uint64_t token, uint32_t layer,
                           int32_t *ids);

/* Collects requests in memory and writes them as one file. One thread at a time. */
struct nep_trace_writer;

/* num_requests, num_tokens of shape are ignored; domains: [num_domains] names, 31 bytes at most. */
NEP_API enum nep_status nep_trace_writer_create(const struct nep_trace_shape *shape,
                                                const char *model, const char *const *domains,
                                                struct nep_trace_writer **writer_p);
/* first_token of request is ignored; ids: [tokens][layers][top_k], -1 = none. */
NEP_API enum nep_status nep_trace_writer_add(struct nep_trace_writer *writer,
                                             const struct nep_trace_request *request,
                                             const int32_t *ids);
/* Writes through a temporary file renamed into place. The writer stays usable. */
NEP_API enum nep_status nep_trace_writer_save(const struct nep_trace_writer *writer,
                                              const char *path);
NEP_API void nep_trace_writer_destroy(struct nep_trace_writer *writer);

/* (token, expert) pairs per logical expert that this rank has dispatched: pairs[E], of one layer.
 */
NEP_API enum nep_status nep_ep_load(const struct nep_ep *ep, uint32_t layer, uint64_t *pairs);
/*
 * Most rows that any dispatch can bring this rank: outputs of that size can be given to
 * nep_dispatch_recv without asking for counts first. Distinct experts of a token are not assumed.
 */
NEP_API enum nep_status nep_ep_max_rows(const struct nep_ep *ep, uint64_t *rows_p);

/* ---- recording ---------------------------------------------------------------------------- */

struct nep_recorder_params {
    size_t size;
    uint32_t sample_ppm;   /* of a million requests, so many are recorded; 0: 10000 */
    uint32_t max_requests; /* 0: 4096 */
    uint64_t max_bytes;    /* of ids; when full, nothing more is recorded; 0: 64 MiB */
    const char *model;     /* a name for the trace, 63 bytes at most; may be NULL */
};
/*
 * Records the routing of fresh dispatches of this ep from now on, for the placement solver: tokens
 * of sampled requests, once all num_layers layers of a step have come with the same tokens in the
 * same order. All memory is taken here. Starting again begins a new recording.
 */
NEP_API enum nep_status nep_ep_record_start(struct nep_ep *ep,
                                            const struct nep_recorder_params *params);
/* Writes what is recorded so far as a trace. *num_tokens_p (may be NULL): tokens in it. */
NEP_API enum nep_status nep_ep_record_save(struct nep_ep *ep, const char *path,
                                           uint64_t *num_tokens_p);
NEP_API void nep_ep_record_stop(struct nep_ep *ep);

/* ---- maps while running ------------------------------------------------------------------- */

/*
 * Stages a map for the ep's operation number `op` and all later ones; all ranks name the same op
 * and an equal map (checked by COUNTS: a rank that differs is named). Of the shape of the ep, slots
 * per rank included. The map is held by the ep. Fresh dispatches route with it; handles keep the
 * version they were routed with. At most 4 may be staged. Not on the path of a token. *version_p
 * (may be NULL): its number.
 */
NEP_API enum nep_status nep_ep_stage_map(struct nep_ep *ep, const struct nep_map *map, uint64_t op,
                                         uint32_t *version_p);

struct nep_map_state {
    size_t size;
    uint64_t next_op; /* number of the next operation sent: a map can be staged from it on */
    uint32_t version; /* in use; 0 is that of nep_ep_create */
    uint32_t newest;  /* of all staged */
    uint32_t
        oldest_held; /* by a handle that may still combine: the experts of older ones are free */
};
NEP_API enum nep_status nep_ep_map_state(const struct nep_ep *ep, struct nep_map_state *state_p);

/* ---- placement maps ----------------------------------------------------------------------- */

struct nep_map_shape {
    size_t size;
    uint32_t num_layers;
    uint32_t num_experts;
    uint32_t num_nodes;
    uint32_t num_ranks;
    uint32_t slots_per_rank;
    const uint32_t *ranks_per_node; /* [num_nodes]; in results it belongs to the map */
};

/* Expert e on slot e (rank e / L), L = ceil(E / R) when shape->slots_per_rank is 0. */
NEP_API enum nep_status nep_map_contiguous(const struct nep_map_shape *shape,
                                           struct nep_map **map_p);
/* Reads and checks a .nepmap file; the message of NEP_ERR_FORMAT has the line. */
NEP_API enum nep_status nep_map_load(const char *path, struct nep_map **map_p);
/* Writes it sorted, through a temporary file renamed into place. */
NEP_API enum nep_status nep_map_save(const struct nep_map *map, const char *path);
NEP_API enum nep_status nep_map_get_shape(const struct nep_map *map, struct nep_map_shape *shape_p);
NEP_API void nep_map_destroy(struct nep_map *map);

/* ---- solving a map from a trace ----------------------------------------------------------- */

struct nep_solve_params {
    size_t size;
    /* Nodes, ranks and slots. num_layers and num_experts are the trace's. slots_per_rank 0:
     * ceil(E / R); more than that: the slots beyond hold second copies of experts. */
    const struct nep_map_shape *shape;
    const uint32_t *requests; /* which requests of the trace; NULL: all */
    uint32_t num_requests;
    uint32_t num_threads;   /* the result does not depend on it; 0: 1 */
    double max_imbalance;   /* limit on max/mean load of nodes on this trace; 0: 1.10 */
    uint64_t seed;          /* 0 is a seed */
    uint64_t max_proposals; /* budget of the search, swaps looked at per layer and round; 0: enough
                               to end by itself */
    uint64_t time_limit_ns; /* stop improving then, and mark the map truncated; 0: none */
    uint32_t max_tokens;    /* sample at most about so many tokens a layer; 0: 32768 */
    /* Called from the calling thread now and then, done in 0 to 1. NULL: none. */
    void (*progress)(void *ctx, double done, uint64_t eta_ns);
    void *progress_ctx;
    /* Start from a running map of the same shape and move at most max_moves copies (a new expert in
     * a slot is one), those that save most first. NULL: from nothing. */
    const struct nep_map *warm;
    uint64_t max_moves; /* over all layers; 0 with warm: no limit */
};

/*
 * Places experts near the requests that use them: fewest distinct remote nodes per token, homes of
 * requests and experts chosen together, hard limits on slots and load, second copies where they
 * save most, then ranks inside nodes. Deterministic. docs/placement.md explains it. Impossible
 * slots and limits are refused with the numbers. Any thread.
 */
NEP_API enum nep_status nep_map_solve(const struct nep_trace *trace,
                                      const struct nep_solve_params *params,
                                      struct nep_map **map_p);
/* 1: a time limit cut the search short; it would differ on another machine. Not kept in files. */
NEP_API int nep_map_is_truncated(const struct nep_map *map);

/*
 * Load only, by the rules of DeepSeek's EPLB: loads is [num_layers][num_experts], not negative;
 * slots beyond the experts hold copies of the busiest. num_groups: groups of experts that stay
 * whole on a node where they divide evenly over nodes, else 1. Nodes must be equal. Any thread.
 */
NEP_API enum nep_status nep_map_balance(const struct nep_map_shape *shape, uint32_t num_groups,
                                        const double *loads, struct nep_map **map_p);

/* ---- from one map to another -------------------------------------------------------------- */

/* One expert to copy. Slots are physical; in the order given, no move reads a slot that an earlier
 * one has overwritten, unless is_staged. */
struct nep_map_move {
    uint32_t layer;
    uint32_t expert;
    uint32_t from_slot; /* a copy in the old map: on the same rank, else the same node, else any */
    uint32_t to_slot;
    uint32_t is_staged; /* part of a ring of moves: read it aside before its layer's moves start */
};

/*
 * The moves that turn `from` into `to`, of the same shape, layer by layer; experts that stay in
 * their slots do not appear. moves: [capacity]; *num_p is how many there are. NEP_ERR_OVERFLOW when
 * they do not fit (then *num_p is written too, so that a call with capacity 0 counts them).
 */
NEP_API enum nep_status nep_map_diff(const struct nep_map *from, const struct nep_map *to,
                                     struct nep_map_move *moves, uint64_t capacity,
                                     uint64_t *num_p);
/*
 * 1 when a new map pays for its moves: rows saved per token and layer x bytes of a row (both ways)
 * x token-layers expected before it is replaced exceed the bytes that move, by a margin of a
 * quarter for what is not known.
 */
NEP_API int nep_map_pays(double rows_saved_per_token, double row_bytes, double token_layers,
                         uint64_t num_moves, double expert_bytes);

/* ---- keeping a running map in balance ----------------------------------------------------- */

/*
 * The fast one of two speeds: watches what is routed, and where a layer's load leaves its balance
 * moves a few copies, so that drift costs rows slowly and imbalance not at all. No communicator
 * needed. One thread at a time; create one per group and feed it what all ranks route, or a sample.
 */
struct nep_balance;

struct nep_balance_params {
    size_t size;
    const struct nep_map *map; /* kept by reference */
    uint32_t top_k;            /* of what is observed; required */
    uint32_t window_tokens;    /* tokens a layer that decide, the last ones; 0: 768 */
    uint32_t max_moves;        /* copies that may move per layer and update; 0: 8 */
    double act_above; /* max/mean load of nodes in the window that calls for moves; 0: 1.13 */
};

/* What an update found. */
struct nep_balance_result {
    size_t size;
    double imbalance;              /* of nodes in the window, mean over layers, before the moves */
    double remote_nodes_per_token; /* in the window */
    uint64_t moved_copies;
    int is_drifting; /* remote nodes per token rise steadily (Page-Hinkley): time to solve anew */
};

NEP_API enum nep_status nep_balance_create(const struct nep_balance_params *params,
                                           struct nep_balance **balance_p);
NEP_API void nep_balance_destroy(struct nep_balance *balance);
/* ids: [num_tokens][top_k] logical experts, -1 = unused, of tokens whose home is `home`. */
NEP_API enum nep_status nep_balance_observe(struct nep_balance *balance, uint32_t layer,
                                            uint32_t home, const int32_t *ids, uint32_t num_tokens);
/* map_p: a new map to stage (destroy it when done), or NULL when nothing moved. result_p may be
 * NULL. Windows less than a quarter full decide
 * nothing. */
NEP_API enum nep_status nep_balance_update(struct nep_balance *balance, struct nep_map **map_p,
                                           struct nep_balance_result *result_p);

/* ---- the batch queue ---------------------------------------------------------------------- */

/*
 * Which waiting request runs where, and when: requests go to the home where their experts are,
 * within a band of costs to the least loaded one, oldest first, tenants served evenly; a home with
 * nothing to do takes what waits elsewhere (but leaves a request for a 40th of max_age to a full
 * home that is clearly its best, where homes are often full and hardly anything waits); a request
 * older than half of max_age goes before everything younger, at any home, so that the bound holds
 * whatever the mix as long as it would hold first come first served. No communicator, no clock:
 * time is an argument, in any nanoseconds that do not go back. All memory is allocated at creation.
 * Any thread; calls are serialised.
 */
struct nep_queue;

struct nep_queue_params {
    size_t size;
    uint32_t num_homes;   /* required */
    uint32_t home_slots;  /* requests that a home runs at once; required */
    uint32_t capacity;    /* requests known at once, waiting and running; 0: 65536 */
    uint32_t num_tenants; /* 0: 1 */
    uint64_t max_age_ns;  /* bound on waiting; 0: 1 s */
    double band;          /* homes within this share above the least cost count as good; 0: 0.05 */
};

struct nep_request {
    size_t size;
    uint64_t id; /* the caller's, unique among those known */
    uint32_t tenant;
    uint32_t tokens;     /* expected length: what a tenant is charged; 0: 1 */
    const float *scores; /* [num_homes] cost of running there (nep_map_home_scores), copied; NULL:
                            not known yet */
};

struct nep_micro_batch {
    size_t size;
    uint64_t *ids;     /* [capacity], oldest first where tenants allow */
    uint32_t capacity; /* of ids */
    uint32_t num;      /* out */
};

struct nep_queue_stats {
    size_t size;
    uint64_t pushed;
    uint64_t popped;
    uint64_t stolen;      /* ran at another home than they waited for */
    uint64_t urgent;      /* taken because of their age */
    uint64_t max_wait_ns; /* of those popped */
    uint32_t waiting;
    uint32_t running;
};

NEP_API enum nep_status nep_queue_create(const struct nep_queue_params *params,
                                         struct nep_queue **queue_p);
NEP_API void nep_queue_destroy(struct nep_queue *queue);
/* NEP_ERR_BUSY when capacity requests are known. */
NEP_API enum nep_status nep_queue_push(struct nep_queue *queue, const struct nep_request *request,
                                       uint64_t now_ns);
/* What `home` should start now: at most its free slots and batch->capacity. They run from then on,
 * until nep_queue_finish. */
NEP_API enum nep_status nep_queue_pop(struct nep_queue *queue, uint32_t home, uint64_t now_ns,
                                      struct nep_micro_batch *batch);
/* Forgets a request, running or waiting. NEP_ERR_NOT_FOUND if it is not known. */
NEP_API enum nep_status nep_queue_finish(struct nep_queue *queue, uint64_t id);
/*
 * New scores, from decode. A waiting request may change home. For a running one *home_p becomes
 * where it should go on: another home only if that has a free slot and (score here - score there) *
 * tokens_left is above move_cost; it is counted there from then on. Ask at block boundaries.
 */
NEP_API enum nep_status nep_queue_update(struct nep_queue *queue, uint64_t id, const float *scores,
                                         uint32_t tokens_left, float move_cost, uint32_t *home_p);
NEP_API enum nep_status nep_queue_get_stats(struct nep_queue *queue,
                                            struct nep_queue_stats *stats_p);
/* Adds to scores [num_nodes] the remote nodes that these tokens of one layer would visit from each
 * home: the signature of a request is the sum over its prefill. ids: [num_tokens][top_k]. */
NEP_API enum nep_status nep_map_home_scores(const struct nep_map *map, uint32_t layer,
                                            const int32_t *ids, uint32_t num_tokens, uint32_t top_k,
                                            float *scores);

#ifdef __cplusplus
}
#endif

#endif
