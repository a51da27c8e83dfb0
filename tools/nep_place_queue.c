/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/nep_place.h"

int place_queue(struct place_args *args)
{
    return place_error(PLACE_FAILED, "%s is not built yet", args->command);
}
