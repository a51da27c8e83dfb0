/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Progress. One thread per transport polls, near the device; when nothing comes it arms the
 * completion channels, looks once more, and sleeps on them, on the devices' events and on a wake-up
 * file.
 *
 * Threads that wait poll as well (nep_verbs_progress, nep_verbs_completed). While one does, the
 * progress thread only naps, unarmed: woken for each completion it would take the core from the
 * thread that has already handled it. For the same reason arrivals alone wake it (they are sent
 * solicited), unless puts wait for room. Rejected: no thread. A rank that computes would then not
 * take the messages for its node's other ranks, nor answer with credits.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/log.h"
#include "transport/topology.h"
#include "transport/verbs/verbs.h"

enum { NAP_NS = 200000, SEND_NS = 5000000, SLEEP_NS = 200000000 };

/* What the thread sleeps on: these of each path, then, behind them, the last two. */
enum { CHANNEL, EVENTS, DOOR, PER_PATH, WAKE = 0, TRY, OTHERS };

void nep_verbs_progress(struct nep_transport *transport)
{
    struct nep_verbs *verbs = (struct nep_verbs *)transport;
    if (pthread_mutex_trylock(&verbs->poll_lock) == 0) {
        uint64_t polls = atomic_load_explicit(&verbs->num_caller_polls, memory_order_relaxed);
        atomic_store_explicit(&verbs->num_caller_polls, polls + 1, memory_order_relaxed);
        nep_verbs_poll(verbs);
        pthread_mutex_unlock(&verbs->poll_lock);
    }
}

static bool poll_locked(struct nep_verbs *verbs)
{
    pthread_mutex_lock(&verbs->poll_lock);
    bool any = nep_verbs_poll(verbs);
    pthread_mutex_unlock(&verbs->poll_lock);
    return any;
}

/* Whether puts wait for room, which a completion gives, and whether any are under way. */
static void look_at_sends(struct nep_verbs *verbs, bool *waiting_p, bool *under_way_p)
{
    *waiting_p = *under_way_p = false;
    for (uint32_t r = 0; r < verbs->num_ranks; r++) {
        struct nep_verbs_peer *peer = &verbs->peers[r];
        pthread_mutex_lock(&peer->lock);
        *waiting_p = *waiting_p || peer->posted < peer->next || peer->num_resend > 0;
        for (uint32_t q = 0; peer->qps != NULL && q < verbs->num_qps; q++) {
            *under_way_p = *under_way_p || peer->qps[q].posted != peer->qps[q].done;
        }
        pthread_mutex_unlock(&peer->lock);
    }
}

static void arm(struct nep_verbs *verbs, bool only_arrivals)
{
    for (uint32_t p = 0; p < verbs->num_paths; p++) {
        verbs->api.req_notify_cq(verbs->paths[p].cq, only_arrivals);
    }
}

/* A file that hung up says that its device was taken away: it would be ready for ever. */
static void device_gone(struct nep_verbs *verbs, struct nep_verbs_path *path, struct pollfd *file)
{
    struct ibv_async_event event = {.event_type = IBV_EVENT_DEVICE_FATAL};
    file->fd = -1;
    if (!atomic_load_explicit(&path->is_dead, memory_order_relaxed)) {
        nep_warn("verbs: %s is gone: its event file hung up", path->device);
        pthread_mutex_lock(&verbs->poll_lock);
        nep_verbs_event_handle(verbs, path, &event);
        pthread_mutex_unlock(&verbs->poll_lock);
    }
}

static void drain_path(struct nep_verbs *verbs, struct nep_verbs_path *path, struct pollfd *files)
{
    struct ibv_cq *cq;
    void *context;
    while ((files[CHANNEL].revents & POLLIN) != 0 &&
           verbs->api.get_cq_event(path->channel, &cq, &context) == 0) {
        /* acknowledging takes a mutex: in bundles */
        if (++path->num_unacked >= 64) {
            verbs->api.ack_cq_events(path->cq, path->num_unacked);
            path->num_unacked = 0;
        }
    }
    struct ibv_async_event event;
    while ((files[EVENTS].revents & POLLIN) != 0 &&
           verbs->api.get_async_event(path->context, &event) == 0) {
        pthread_mutex_lock(&verbs->poll_lock);
        nep_verbs_event_handle(verbs, path, &event);
        pthread_mutex_unlock(&verbs->poll_lock);
        verbs->api.ack_async_event(&event);
    }
    for (uint32_t i = CHANNEL; i <= EVENTS; i++) {
        if ((files[i].revents & (POLLERR | POLLHUP | POLLNVAL)) != 0 &&
            (files[i].revents & POLLIN) == 0) {
            device_gone(verbs, path, &files[i]);
        }
    }
    if (files[DOOR].revents != 0 && !nep_verbs_door_answer(path)) {
        files[DOOR].fd = -1;
    }
}

/* Takes what the channels and event files hold, and sees to who asks whether this rank lives. */
static void drain(struct nep_verbs *verbs, struct pollfd *files)
{
    for (uint32_t p = 0; p < verbs->num_paths; p++) {
        drain_path(verbs, &verbs->paths[p], &files[PER_PATH * p]);
    }
    struct pollfd *attempt = &files[PER_PATH * verbs->num_paths + TRY];
    if (attempt->revents != 0) {
        nep_verbs_door_tried(verbs);
        attempt->fd = -1;
    }
}

static nfds_t fill_files(const struct nep_verbs *verbs, struct pollfd *files)
{
    for (uint32_t p = 0; p < verbs->num_paths; p++) {
        const struct nep_verbs_path *path = &verbs->paths[p];
        files[CHANNEL] = (struct pollfd){.fd = path->channel->fd, .events = POLLIN};
        files[EVENTS] = (struct pollfd){.fd = path->context->async_fd, .events = POLLIN};
        files[DOOR] = (struct pollfd){.fd = path->door_fd, .events = POLLIN};
        files += PER_PATH;
    }
    files[WAKE] = (struct pollfd){.fd = verbs->wake_fd, .events = POLLIN};
    files[TRY] = (struct pollfd){.fd = verbs->try_fd, .events = POLLOUT};
    return PER_PATH * verbs->num_paths + OTHERS;
}

static void *run(void *arg)
{
    struct nep_verbs *verbs = arg;
    struct pollfd files[PER_PATH * NEP_VERBS_MAX_PATHS + OTHERS];
    nfds_t num_files = fill_files(verbs, files);
    uint32_t spin = verbs->params.config->spin, num_idle = 0;
    if (spin == UINT32_MAX) {
        spin = nep_topology_num_cores() > verbs->num_ranks ? 2000 : 0;
    }
    uint64_t caller_polls = 0;
    while (!atomic_load_explicit(&verbs->stop, memory_order_acquire)) {
        uint64_t polls = atomic_load_explicit(&verbs->num_caller_polls, memory_order_relaxed);
        struct timespec pause = {.tv_nsec = NAP_NS};
        bool callers_poll = polls != caller_polls;
        caller_polls = polls;
        if (!callers_poll) {
            bool waiting, under_way;
            if (poll_locked(verbs)) {
                num_idle = 0;
                continue;
            }
            if (num_idle++ < spin) {
                continue;
            }
            look_at_sends(verbs, &waiting, &under_way);
            arm(verbs, !waiting);
            if (poll_locked(verbs)) { /* came between the last look and arming */
                num_idle = 0;
                continue;
            }
            /* What was sent wakes nobody: its end is looked for here, and by who waits for it. */
            pause.tv_nsec =
                under_way || atomic_load_explicit(&verbs->has_dead, memory_order_relaxed)
                    ? SEND_NS
                    : SLEEP_NS;
        }
        if (ppoll(files, num_files, &pause, NULL) > 0) {
            drain(verbs, files);
        }
        if (atomic_load_explicit(&verbs->has_dead, memory_order_relaxed)) {
            nep_verbs_revive(verbs);
        }
        num_idle = 0;
    }
    return NULL;
}

enum nep_status nep_verbs_progress_start(struct nep_verbs *verbs)
{
    verbs->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (verbs->wake_fd < 0) {
        return nep_fail(NEP_ERR_IO, "verbs: no eventfd: %s", strerror(errno));
    }
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the caller's business */
    int error = pthread_create(&verbs->thread, NULL, run, verbs);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error != 0) {
        return nep_fail(NEP_ERR_NO_MEMORY, "verbs: no progress thread: %s", strerror(error));
    }
    verbs->has_thread = true;
    pthread_setname_np(verbs->thread, "nep-verbs");
    return nep_topology_place_thread(verbs->local, verbs->num_local,
                                     verbs->params.config->progress_cores, verbs->thread, "verbs",
                                     verbs->paths[0].numa);
}

void nep_verbs_progress_stop(struct nep_verbs *verbs)
{
    if (verbs->has_thread) {
        /* release: pairs with the acquire in run */
        atomic_store_explicit(&verbs->stop, true, memory_order_release);
        uint64_t one = 1;
        if (write(verbs->wake_fd, &one, sizeof one) < 0) {
            nep_debug("verbs: waking the progress thread failed: it wakes by itself");
        }
        pthread_join(verbs->thread, NULL);
        verbs->has_thread = false;
    }
    if (verbs->wake_fd >= 0) {
        close(verbs->wake_fd);
        verbs->wake_fd = -1;
    }
}
