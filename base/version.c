/* SPDX-License-Identifier: Apache-2.0 */
/* The version is the header's own: a caller compares what it was compiled with to what it runs. */
#include "nearep.h"

#define TEXT_OF(x) #x
#define TEXT(x)    TEXT_OF(x)

uint32_t nep_version(void)
{
    return NEP_VERSION_MAJOR * 10000u + NEP_VERSION_MINOR * 100u + NEP_VERSION_PATCH;
}

const char *nep_version_string(void)
{
    return TEXT(NEP_VERSION_MAJOR) "." TEXT(NEP_VERSION_MINOR) "." TEXT(NEP_VERSION_PATCH);
}
