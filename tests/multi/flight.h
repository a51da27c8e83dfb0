/* SPDX-License-Identifier: Apache-2.0 */
/* Tensors of a flight, made and freed by the world. */
#ifndef NEP_TESTS_MULTI_FLIGHT_H
#define NEP_TESTS_MULTI_FLIGHT_H

#include "tests/multi/world.h"

uint64_t nep_multi_flight_bytes(const struct nep_multi_world *world);
bool nep_multi_flight_create(struct nep_multi_world *world, struct nep_multi_flight *flight);
void nep_multi_flight_destroy(struct nep_multi_world *world, struct nep_multi_flight *flight);

#endif
