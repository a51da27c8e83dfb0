/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who drives the UCX worker. It is asked for in mode SERIALIZED, which every build of UCX grants,
 * and one atomic flag, `held`, says who drives it. Nobody ever waits for that flag on the path: a
 * put enqueues, then drives the worker if it is free; otherwise the present holder, who looks at
 * the queue again after letting go, sends it. The progress thread sleeps on the worker's event file
 * when there is nothing to do.
 *
 * Rejected: UCX's mode MULTI, which takes a spin lock around all of progress, so that a put would
 * spin through the time slice of a preempted progress thread (with more ranks than cores,
 * milliseconds); and sending only from the progress thread, which costs each small message a
 * wake-up.
 */
#if NEP_HAVE_UCX

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "transport/topology.h"
#include "transport/ucx.h"

enum { ROUNDS = 16, SPIN = 2000 };

uint32_t nep_ucx_pump(struct nep_ucx *ux)
{
    uint32_t moved = 0;
    for (int i = 0; i < ROUNDS; i++) {
        uint32_t now = nep_ucx_send_queued(ux);
        now += ux->lib.ucp_worker_progress(ux->worker);
        if (now == 0) {
            break;
        }
        moved += now;
    }
    if (ux->num_to_close != 0) {
        nep_ucx_close_failed(ux);
    }
    if (nep_now_ns() >= ux->beat_ns) {
        nep_ucx_beat(ux);
    }
    return moved;
}

/*
 * `held` and `num_queued` are used with sequential consistency: who finds `held` set after it has
 * queued something is before the holder's release in their one order, so the holder, who looks at
 * the queue after it (nep_ucx_try_pump, thread_sleep), sees what was queued.
 */
void nep_ucx_release(struct nep_ucx *ux)
{
    /* Pairs with the exchanges below, by which the worker changes hands. */
    atomic_store(&ux->held, false);
}

bool nep_ucx_try_pump(struct nep_ucx *ux, uint32_t *moved_p)
{
    uint32_t moved = 0;
    bool got = false;
    do {
        if (atomic_exchange(&ux->held, true)) {
            break;
        }
        got = true;
        moved += nep_ucx_pump(ux);
        nep_ucx_release(ux);
    } while (atomic_load(&ux->num_queued) != 0);
    *moved_p = moved;
    return got;
}

void nep_ucx_hold(struct nep_ucx *ux)
{
    while (atomic_exchange(&ux->held, true)) {
        sched_yield();
    }
}

void nep_ucx_wake(struct nep_ucx *ux)
{
    if (atomic_exchange(&ux->asleep, false)) {
        uint64_t one = 1;
        if (write(ux->wake_fd, &one, sizeof one) < 0 && errno != EAGAIN) {
            nep_warn("transport ucx: could not wake the progress thread: %s", strerror(errno));
        }
    }
}

/* ---- the progress thread ------------------------------------------------------------------ */

static void nap(struct nep_ucx *ux, bool armed)
{
    uint64_t left_ns = nep_left_ns(ux->beat_ns);
    /* Not armed: somebody else drives the worker; look again soon, for he may stop. */
    int timeout_ms = armed ? (int)(left_ns / NEP_MS) + 1 : 1;
    struct pollfd fds[2] = {{.fd = ux->wake_fd, .events = POLLIN},
                            {.fd = ux->worker_fd, .events = POLLIN}};
    if (poll(fds, armed ? 2 : 1, timeout_ms) > 0 && fds[0].revents != 0) {
        uint64_t count;
        if (read(ux->wake_fd, &count, sizeof count) < 0 && errno != EAGAIN) {
            nep_warn("transport ucx: reading an eventfd: %s", strerror(errno));
        }
    }
}

static void thread_sleep(struct nep_ucx *ux)
{
    /* Set before arming: a put from here on either is seen below or wakes this thread. */
    atomic_store(&ux->asleep, true);
    bool armed = false;
    if (!atomic_exchange(&ux->held, true)) {
        armed = ux->lib.ucp_worker_arm(ux->worker) == UCS_OK;
        nep_ucx_release(ux);
        if (!armed || atomic_load(&ux->num_queued) != 0) {
            atomic_store(&ux->asleep, false);
            return;
        }
    }
    if (!atomic_load(&ux->stop)) {
        nap(ux, armed);
    }
    atomic_store(&ux->asleep, false);
}

static void *thread_main(void *arg)
{
    struct nep_ucx *ux = arg;
    uint32_t idle = 0;
    while (!atomic_load(&ux->stop)) {
        uint32_t moved;
        if (nep_ucx_try_pump(ux, &moved) && moved != 0) {
            idle = 0;
        } else if (idle < ux->spin &&
                   atomic_load_explicit(&ux->num_in_flight, memory_order_relaxed) != 0) {
            idle++;
            sched_yield();
        } else {
            thread_sleep(ux);
        }
    }
    return NULL;
}

enum nep_status nep_ucx_thread_start(struct nep_ucx *ux)
{
    const struct nep_topology *topology = ux->params.topology;
    uint32_t on_node = topology->node_ranks[topology->node];
    /* Each rank has a caller and this thread; spinning pays only where both have a core. */
    ux->spin = ux->params.config->spin;
    if (ux->spin == UINT32_MAX) {
        ux->spin = 2 * on_node <= nep_topology_num_cores() ? SPIN : 0;
    }
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the caller's business */
    int error = pthread_create(&ux->thread, NULL, thread_main, ux);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error != 0) {
        return nep_fail(NEP_ERR_IO, "transport ucx: no progress thread: %s", strerror(error));
    }
    ux->has_thread = true;
    pthread_setname_np(ux->thread, "nep-ucx");
    enum nep_status status =
        nep_topology_place_thread(topology->local, on_node, ux->params.config->progress_cores,
                                  ux->thread, "transport ucx", -1);
    if (status != NEP_OK) {
        nep_ucx_thread_stop(ux);
        return status;
    }
    return NEP_OK;
}

void nep_ucx_thread_stop(struct nep_ucx *ux)
{
    if (!ux->has_thread) {
        return;
    }
    atomic_store(&ux->stop, true);
    uint64_t one = 1;
    if (write(ux->wake_fd, &one, sizeof one) < 0) {
        nep_debug("transport ucx: wake at close: %s", strerror(errno)); /* polls within a second */
    }
    pthread_join(ux->thread, NULL);
    ux->has_thread = false;
}

#endif
