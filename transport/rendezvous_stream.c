/* SPDX-License-Identifier: Apache-2.0 */
/* A client's bytes: non-blocking socket, poll with a deadline, whole messages. */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "transport/rendezvous_client.h"
#include "transport/rendezvous_socket.h"

static enum nep_status lost(struct nep_rendezvous_client *client, const char *why)
{
    return nep_fail(NEP_ERR_PEER_LOST, "%s is gone: %s", client->name, why);
}

enum nep_status nep_rdv_send_all(struct nep_rendezvous_client *client, const uint8_t *bytes,
                                 size_t len, uint64_t deadline_ns)
{
    for (size_t sent = 0; sent < len;) {
        ssize_t put = send(client->fd, bytes + sent, len - sent, MSG_NOSIGNAL);
        if (put > 0) {
            sent += (size_t)put;
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            if (!nep_rdv_wait(client->fd, POLLOUT, deadline_ns)) {
                return nep_fail(NEP_ERR_TIMEOUT, "%s takes no data", client->name);
            }
        } else if (errno != EINTR) {
            return lost(client, strerror(errno));
        }
    }
    return NEP_OK;
}

enum nep_status nep_rdv_receive(struct nep_rendezvous_client *client, size_t bytes,
                                uint64_t deadline_ns)
{
    if (bytes > client->in_cap) {
        uint8_t *grown = realloc(client->in, bytes);
        if (grown == NULL) {
            return nep_fail(NEP_ERR_NO_MEMORY, "no memory for %zu bytes from %s", bytes,
                            client->name);
        }
        client->in = grown;
        client->in_cap = bytes;
    }
    while (client->in_have < bytes) {
        ssize_t got = recv(client->fd, client->in + client->in_have, bytes - client->in_have, 0);
        if (got > 0) {
            client->in_have += (size_t)got;
        } else if (got == 0) {
            return lost(client, "it closed the connection");
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            if (!nep_rdv_wait(client->fd, POLLIN, deadline_ns)) {
                return nep_fail(NEP_ERR_TIMEOUT, "%s does not answer", client->name);
            }
        } else if (errno != EINTR) {
            return lost(client, strerror(errno));
        }
    }
    return NEP_OK;
}

enum nep_status nep_rdv_receive_message(struct nep_rendezvous_client *client, uint64_t deadline_ns,
                                        struct nep_rdv_message *message)
{
    size_t sealed = 0;
    enum nep_status status = NEP_OK;
    if (client->in_have < NEP_RDV_LENGTH_BYTES) {
        status = nep_rdv_receive(client, NEP_RDV_LENGTH_BYTES, deadline_ns);
    }
    if (status == NEP_OK) {
        status = nep_rdv_read_length(client->in, NEP_RDV_MAX_FRAME, &sealed);
    }
    if (status == NEP_OK) {
        status = nep_rdv_receive(client, NEP_RDV_LENGTH_BYTES + sealed, deadline_ns);
    }
    if (status != NEP_OK) {
        return status;
    }
    client->in_have = 0;
    status = nep_rdv_open(&client->session, client->in, client->in + NEP_RDV_LENGTH_BYTES, sealed);
    if (status != NEP_OK) {
        return status;
    }
    return nep_rdv_message_decode(client->in + NEP_RDV_LENGTH_BYTES, sealed - NEP_RDV_TAG_BYTES,
                                  message);
}

enum nep_status nep_rdv_send_message(struct nep_rendezvous_client *client,
                                     const struct nep_rdv_message *message, uint64_t deadline_ns)
{
    size_t len = nep_rdv_message_bytes(message);
    uint8_t *body = malloc(2 * len + NEP_RDV_LENGTH_BYTES + NEP_RDV_TAG_BYTES);
    if (body == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for %zu bytes to %s", len, client->name);
    }
    nep_rdv_message_encode(message, body);
    nep_rdv_seal(&client->session, body, len, body + len);
    enum nep_status status = nep_rdv_send_all(
        client, body + len, NEP_RDV_LENGTH_BYTES + len + NEP_RDV_TAG_BYTES, deadline_ns);
    free(body);
    return status;
}
