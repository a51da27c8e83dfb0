/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How ranks meet: the caller's functions, or the built-in TCP rendezvous (rendezvous.h), behind the
 * one structure nep_bootstrap. Helpers here check what every rank must agree on and name who
 * differs.
 */
#ifndef NEP_TRANSPORT_BOOTSTRAP_H
#define NEP_TRANSPORT_BOOTSTRAP_H

#include "base/config.h"
#include "nearep.h"

/*
 * Resolves rank, size and bootstrap functions from params and the launcher's environment. Connects
 * the built-in rendezvous when params->bootstrap is NULL; rank 0 serves it where no one does
 * (docs/bootstrap.md). What out->ctx needs is owned by *owned_p (NULL for a caller's bootstrap);
 * free it with nep_bootstrap_close, when `out` is used no more.
 */
struct nep_rendezvous_client;
enum nep_status nep_bootstrap_open(const struct nep_comm_params *params,
                                   const struct nep_config *config, uint64_t timeout_ns,
                                   struct nep_bootstrap *out, uint32_t *rank_p,
                                   uint32_t *num_ranks_p, struct nep_rendezvous_client **owned_p);
void nep_bootstrap_close(struct nep_rendezvous_client *owned);

/* allgather with a status and a sentence. in: bytes of this rank; out: num_ranks * bytes. */
enum nep_status nep_bootstrap_allgather(const struct nep_bootstrap *bootstrap, const void *in,
                                        void *out, size_t bytes, uint64_t timeout_ns,
                                        const char *what);

/*
 * One field that all ranks must agree on. nep_bootstrap_agree gathers the values of all fields and,
 * where one differs, fails with NEP_ERR_MISMATCH on EVERY rank: "ep hidden differs: 7168 on ranks
 * 0-6, 4096 on rank 7".
 */
struct nep_agree_field {
    const char *name;
    uint64_t value;
};
enum nep_status nep_bootstrap_agree(const struct nep_bootstrap *bootstrap, uint32_t num_ranks,
                                    const char *what, const struct nep_agree_field *fields,
                                    uint32_t num_fields, uint64_t timeout_ns);
/* One text, of which the first 55 characters count: "communicator: fabric differs: ucx on ...". */
enum nep_status nep_bootstrap_agree_text(const struct nep_bootstrap *bootstrap, uint32_t num_ranks,
                                         const char *what, const char *name, const char *text,
                                         uint64_t timeout_ns);
/*
 * The version and all variables that must be equal (NEP_INTRA, NEP_INTER, ...): "configuration:
 * NEP_INTER differs: ucx on ranks 0-6, shm on rank 7". For the first exchange of a group.
 */
enum nep_status nep_bootstrap_agree_config(const struct nep_bootstrap *bootstrap,
                                           uint32_t num_ranks, const struct nep_config *config,
                                           uint64_t timeout_ns);
/*
 * Makes a failure common: every rank passes its own status; when any failed, all return a failure,
 * and those that had succeeded get "rank 3 failed: <its sentence>".
 */
enum nep_status nep_bootstrap_common(const struct nep_bootstrap *bootstrap, uint32_t rank,
                                     uint32_t num_ranks, enum nep_status mine, uint64_t timeout_ns);

/* Appends the ranks for which is_in holds to text, in words: "0-6, 9". */
typedef bool (*nep_rank_test_fn)(const void *ctx, uint32_t rank);
void nep_ranks_print(char *text, size_t cap, uint32_t num_ranks, nep_rank_test_fn is_in,
                     const void *ctx);

#endif
