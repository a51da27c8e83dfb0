/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where ranks come from. Without a launcher this process forks them (their command line is this
 * one), hosts the rendezvous and watches: a child that a signal ended is named at once, the others
 * get the time that the library's deadline allows to find out by themselves, and nobody outlives
 * this process. With --threads they are threads and meet in memory. Under torchrun, mpirun or srun
 * this process is one rank. For the baseline the same command runs again under mpirun.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/config.h"
#include "perftest/perf.h"
#include "perftest/rank.h"
#include "transport/bootstrap.h"
#include "transport/rendezvous.h"
#include "transport/topology.h"

/* ---- spawned processes ---- */

struct parent {
    const struct nep_perf_options *options;
    struct nep_perf_control *control;
    uint64_t timeout_ns;
    char host[64];    /* of the rendezvous: a socket without a name in any file system */
    pid_t pids[1024]; /* 0: reaped */
    uint32_t num_left;
    uint32_t num_gone; /* lost, and gone on without */
    int rc;
    uint64_t kill_at_ns; /* after a loss; 0: nobody is lost */
};

static int child_main(struct parent *parent, uint32_t rank)
{
    struct nep_perf_control *control = parent->control;
    uint64_t deadline_ns = nep_deadline_ns(parent->timeout_ns);
    while (atomic_load(&control->is_serving) == 0) {
        if (atomic_load(&control->failed) != 0 || nep_left_ns(deadline_ns) == 0) {
            return NEP_PERF_FAILED;
        }
        usleep(1000);
    }
    uint32_t num_ranks = parent->options->num_ranks;
    struct nep_perf_seat seat;
    nep_perf_seat_memory(&seat, control, rank, num_ranks, parent->timeout_ns);
    struct nep_rendezvous_client *client = NULL;
    struct nep_rendezvous_params params = {.host = parent->host,
                                           .num_ranks = num_ranks,
                                           .rank = rank,
                                           .timeout_ns = parent->timeout_ns};
    if (nep_rendezvous_client_open(&params, &client) != NEP_OK) {
        return nep_perf_error(NEP_PERF_FAILED, "rank %u: rendezvous: %s", rank, nep_last_message());
    }
    nep_rendezvous_client_bootstrap(client, &seat.bootstrap);
    int rc = nep_perf_rank_main(parent->options, &seat);
    nep_rendezvous_client_close(client);
    return rc;
}

static bool spawn(struct parent *parent)
{
    pid_t self = getpid();
    for (uint32_t r = 0; r < parent->options->num_ranks; r++) {
        pid_t pid = fork();
        if (pid < 0) {
            nep_perf_error(NEP_PERF_FAILED, "rank %u cannot be started: %s", r, strerror(errno));
            return false;
        }
        if (pid == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            if (getppid() != self) {
                _exit(NEP_PERF_FAILED); /* the parent died before prctl */
            }
            int rc = child_main(parent, r);
            fflush(stdout);
            exit(rc);
        }
        parent->pids[r] = pid;
        parent->num_left++;
    }
    return true;
}

static void kill_children(struct parent *parent)
{
    for (uint32_t r = 0; r < parent->options->num_ranks; r++) {
        if (parent->pids[r] > 0) {
            kill(parent->pids[r], SIGKILL);
        }
    }
}

/* One child ended. */
static void reap(struct parent *parent, pid_t pid, int status)
{
    uint32_t rank = 0;
    while (rank < parent->options->num_ranks && parent->pids[rank] != pid) {
        rank++;
    }
    if (rank == parent->options->num_ranks) {
        return;
    }
    parent->pids[rank] = 0;
    parent->num_left--;
    int rc = WIFEXITED(status) ? WEXITSTATUS(status) : NEP_PERF_FAILED;
    if (parent->options->is_continued && WIFSIGNALED(status)) {
        nep_perf_error(rc, "rank %u lost: process %d was ended by signal %d (%s); the others go on",
                       rank, (int)pid, WTERMSIG(status), strsignal(WTERMSIG(status)));
        atomic_store(&parent->control->is_gone[rank], 1);
        parent->num_gone++;
        return;
    }
    if (rc > parent->rc) {
        parent->rc = rc;
    }
    if (rc == NEP_PERF_OK) {
        return;
    }
    if (parent->kill_at_ns == 0) {
        uint64_t grace_ns = parent->timeout_ns + parent->timeout_ns / 2;
        parent->kill_at_ns = nep_deadline_ns(grace_ns);
        if (WIFSIGNALED(status)) {
            atomic_store(&parent->control->lost_rank, rank + 1);
            atomic_store(&parent->control->reported, 1);
            nep_perf_error(NEP_PERF_FAILED, "rank %u lost: process %d was ended by signal %d (%s)",
                           rank, (int)pid, WTERMSIG(status), strsignal(WTERMSIG(status)));
        }
    }
    atomic_store(&parent->control->failed, 1);
}

static void supervise(struct parent *parent)
{
    while (parent->num_left > 0) {
        int status;
        pid_t pid = waitpid(-1, &status, WNOHANG);
        if (pid > 0) {
            reap(parent, pid, status);
            continue;
        }
        if (parent->kill_at_ns != 0 && nep_left_ns(parent->kill_at_ns) == 0) {
            kill_children(parent);
            parent->kill_at_ns = UINT64_MAX;
        }
        struct timespec pause = {.tv_nsec = 5000000};
        nanosleep(&pause, NULL);
    }
}

static int run_processes(const struct nep_perf_options *options, uint64_t timeout_ns)
{
    struct parent *parent = calloc(1, sizeof(*parent));
    struct nep_perf_control *control =
        mmap(NULL, sizeof(*control), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (parent == NULL || control == MAP_FAILED) {
        free(parent);
        return nep_perf_error(NEP_PERF_FAILED, "out of memory");
    }
    parent->options = options;
    parent->control = control;
    parent->timeout_ns = timeout_ns;
    snprintf(parent->host, sizeof(parent->host), "@nep-perf-%d", (int)getpid());
    fflush(NULL); /* or children would write what is buffered again */
    struct nep_rendezvous_server *server = NULL;
    bool is_spawned = spawn(parent);
    /* After the forks: the server has a thread. */
    uint16_t port;
    struct nep_rendezvous_params params = {.host = parent->host, .num_ranks = options->num_ranks};
    if (is_spawned && nep_rendezvous_server_start(&params, &server, &port) != NEP_OK) {
        nep_perf_error(NEP_PERF_FAILED, "rendezvous: %s", nep_last_message());
        is_spawned = false;
    }
    if (!is_spawned) {
        parent->rc = NEP_PERF_FAILED;
        atomic_store(&control->failed, 1);
        kill_children(parent);
    }
    atomic_store(&control->is_serving, is_spawned);
    supervise(parent);
    if (parent->num_gone == options->num_ranks) {
        parent->rc = nep_perf_error(NEP_PERF_FAILED, "all ranks are lost");
    }
    nep_rendezvous_server_stop(server);
    int rc = parent->rc;
    munmap(control, sizeof(*control));
    free(parent);
    return rc;
}

/* Reads map and trace once before there are ranks, so that what is wrong with them is said once. */
static int check_plan(const struct nep_perf_options *given)
{
    struct nep_perf_options options = *given;
    struct nep_topology_store *store = NULL;
    struct nep_topology topology = {.size = sizeof(topology)};
    struct nep_perf_plan *plan = NULL;
    if (nep_topology_from_sizes(options.ranks_per_node, options.num_nodes, 0, &store, &topology) !=
        NEP_OK) {
        return nep_perf_error(NEP_PERF_USAGE, "%s", nep_last_message());
    }
    int rc = nep_perf_plan_create(&options, &topology, &plan);
    nep_perf_plan_destroy(plan);
    nep_topology_destroy(store);
    return rc;
}

/* ---- threads ---- */

struct thread {
    pthread_t id;
    const struct nep_perf_options *options;
    struct nep_perf_seat seat;
    int rc;
};

static void *thread_main(void *arg)
{
    struct thread *thread = arg;
    thread->rc = nep_perf_rank_main(thread->options, &thread->seat);
    return NULL;
}

static int run_threads(struct nep_perf_options *options, uint64_t timeout_ns)
{
    if (options->is_continued) {
        return nep_perf_error(NEP_PERF_USAGE, "--on-fault continue does not go with --threads: a "
                                              "thread is not lost alone");
    }
    if (strcmp(options->intra, "auto") == 0) {
        options->intra = "loop";
    }
    if (strcmp(options->inter, "auto") == 0) {
        options->inter = "loop";
    }
    struct nep_perf_control *control = calloc(1, sizeof(*control));
    struct thread *threads = calloc(options->num_ranks, sizeof(*threads));
    int rc = NEP_PERF_OK;
    uint32_t started = 0;
    while (control != NULL && threads != NULL && started < options->num_ranks) {
        struct thread *thread = &threads[started];
        thread->options = options;
        nep_perf_seat_memory(&thread->seat, control, started, options->num_ranks, timeout_ns);
        if (pthread_create(&thread->id, NULL, thread_main, thread) != 0) {
            atomic_store(&control->failed, 1);
            rc = nep_perf_error(NEP_PERF_FAILED, "rank %u: its thread cannot be started", started);
            break;
        }
        started++;
    }
    for (uint32_t r = 0; r < started; r++) {
        pthread_join(threads[r].id, NULL);
        rc = threads[r].rc > rc ? threads[r].rc : rc;
    }
    if (control == NULL || threads == NULL) {
        rc = nep_perf_error(NEP_PERF_FAILED, "out of memory");
    }
    free(control);
    free(threads);
    return rc;
}

/* ---- one rank of a launcher ---- */

static int run_launched(const struct nep_perf_options *options, const struct nep_config *config,
                        const char *launcher)
{
    /* Longer than the library's: a rank that waits here for ranks that wait for a stuck one must
     * not end before they have said who it is, or they take its end for the cause. */
    struct nep_perf_seat seat = {.timeout_ns = config->timeout_ns + config->timeout_ns / 4,
                                 .barrier = nep_perf_seat_gather_barrier};
    struct nep_comm_params params = {.size = sizeof(params)};
    struct nep_rendezvous_client *client = NULL;
    if (nep_bootstrap_open(&params, config, config->timeout_ns, &seat.bootstrap, &seat.rank,
                           &seat.num_ranks, &client) != NEP_OK) {
        return nep_perf_error(NEP_PERF_FAILED, "under %s: %s", launcher, nep_last_message());
    }
    int rc = NEP_PERF_USAGE;
    struct nep_perf_options own = *options;
    if (own.is_continued) {
        nep_perf_error(rc,
                       "--on-fault continue needs ranks that nep-perf starts itself; %s ends "
                       "all when one is lost",
                       launcher);
    } else if (own.has_ranks && own.num_ranks != seat.num_ranks) {
        nep_perf_error(rc, "--ranks is %u, but %s started %u", own.num_ranks, launcher,
                       seat.num_ranks);
    } else if (own.is_threads) {
        nep_perf_error(rc, "--threads does not go with %s", launcher);
    } else if (!own.has_nodes || nep_perf_options_nodes(&own, seat.num_ranks) == -1) {
        rc = nep_perf_rank_main(&own, &seat);
    }
    nep_bootstrap_close(client);
    return rc;
}

/* ---- the baseline: the same command under mpirun, by the binary that has MPI ---- */

static int run_under_mpi(const struct nep_perf_options *options, bool is_launched)
{
    char path[4096];
    ssize_t len = readlink("/proc/self/exe", path, sizeof(path) - 5);
    if (len < 0) {
        return nep_perf_error(NEP_PERF_FAILED, "cannot find the own program: %s", strerror(errno));
    }
    memcpy(path + len, "-mpi", 5);
    if (access(path, X_OK) != 0) {
        return nep_perf_error(NEP_PERF_USAGE,
                              "--baseline mpi: %s is not there: MPI was not found when this was "
                              "built",
                              path);
    }
    char ranks[16];
    char nodes[6 * 1024] = "";
    snprintf(ranks, sizeof(ranks), "%u", options->num_ranks);
    for (uint32_t n = 0; n < options->num_nodes; n++) {
        size_t used = strlen(nodes);
        snprintf(nodes + used, sizeof(nodes) - used, "%s%u", n > 0 ? "," : "",
                 options->ranks_per_node[n]);
    }
    setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 0);
    setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 0);
    /* Under a launcher only the program and what the user gave; what is given comes last and wins.
     */
    char *prefix[] = {"mpirun", "--oversubscribe",  "--bind-to", "none", "-n", ranks, path,
                      "ep",     "--ranks-per-node", nodes};
    size_t skip = is_launched ? 6 : 0;
    size_t num_prefix = is_launched ? 2 : sizeof(prefix) / sizeof(prefix[0]);
    char **argv = calloc(num_prefix + (size_t)options->argc + 1, sizeof(*argv));
    if (argv == NULL) {
        return nep_perf_error(NEP_PERF_FAILED, "out of memory");
    }
    memcpy(argv, prefix + skip, num_prefix * sizeof(*argv));
    memcpy(argv + num_prefix, options->argv + 1, ((size_t)options->argc - 1) * sizeof(*argv));
    execvp(argv[0], argv);
    int rc = nep_perf_error(NEP_PERF_FAILED, "--baseline mpi: %s cannot be started: %s", argv[0],
                            strerror(errno));
    free(argv);
    return rc;
}

int nep_perf_ep_main(int argc, char **argv)
{
    struct nep_perf_options *options = calloc(1, sizeof(*options));
    if (options == NULL) {
        return nep_perf_error(NEP_PERF_FAILED, "out of memory");
    }
    int rc = nep_perf_options_parse(argc, argv, options);
    struct nep_config config;
    struct nep_launch_env env;
    if (rc == -1 && (nep_config_load(&config) != NEP_OK || nep_launch_env_read(&env) != NEP_OK)) {
        rc = nep_perf_error(NEP_PERF_USAGE, "%s", nep_last_message());
    }
    if (rc != -1) {
        free(options);
        return rc;
    }
    bool is_launched = env.num_ranks != UINT32_MAX && env.num_ranks != 0;
    if (nep_perf_run_mpi != NULL) {
        rc = nep_perf_run_mpi(options);
    } else if (options->baseline != NULL && is_launched) {
        rc = run_under_mpi(options, true);
    } else if (is_launched) {
        rc = run_launched(options, &config, env.launcher);
    } else {
        rc = nep_perf_options_nodes(options, options->num_ranks);
        options->has_nodes = true;
        if (rc == -1 && (options->map != NULL || options->trace != NULL)) {
            rc = check_plan(options);
        }
        if (rc == -1 && options->baseline != NULL) {
            rc = run_under_mpi(options, false);
        } else if (rc == -1) {
            rc = options->is_threads ? run_threads(options, config.timeout_ns)
                                     : run_processes(options, config.timeout_ns);
        }
    }
    free(options);
    return rc;
}
