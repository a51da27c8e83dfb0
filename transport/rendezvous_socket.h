/* SPDX-License-Identifier: Apache-2.0 */
/* Sockets of the rendezvous: TCP by name or address, or "@name" in the abstract Unix namespace. */
#ifndef NEP_TRANSPORT_RENDEZVOUS_SOCKET_H
#define NEP_TRANSPORT_RENDEZVOUS_SOCKET_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

/*
 * Listens, non-blocking. port 0: any free one. NEP_ERR_BUSY: taken; NEP_ERR_NOT_FOUND: no address
 * of this machine. A name that means loopback here but is not "localhost" (as a host's own name in
 * Debian's /etc/hosts) is listened to on all addresses: other hosts resolve it to another one.
 */
enum nep_status nep_rdv_listen(const char *host, uint16_t port, int *fd_p, uint16_t *port_p);
/* A connected non-blocking socket by the deadline. */
enum nep_status nep_rdv_connect(const char *host, uint16_t port, uint64_t deadline_ns, int *fd_p);
/* False for a Unix socket whose other end runs as another user. */
bool nep_rdv_is_peer_allowed(int fd);
/* No delay, and an end within half a minute where the other host is gone. */
void nep_rdv_set_options(int fd);
/* Waits for events (POLLIN, POLLOUT) until the deadline; false when it passes. */
bool nep_rdv_wait(int fd, short events, uint64_t deadline_ns);

#endif
