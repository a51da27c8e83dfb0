/* SPDX-License-Identifier: Apache-2.0 */
/*
 * UCX is loaded when a communicator first asks for it, so that a machine without it gets a sentence
 * and not a load error, and so that nearep built here runs with whatever UCX is there. Types and
 * constants come from the headers at build time; the version asked of ucp_init is the oldest that
 * has all that is used (1.13), not that of the headers, because every structure carries a field
 * mask and no newer field is ever set.
 *
 * Rejected: linking with libucp (a package must then depend on it), and a plug-in of nearep's own
 * (one more file to find, for thirty pointers).
 *
 * RTLD_NODELETE: UCX starts an asynchronous thread and patches memory functions; unloading it is
 * not safe.
 */
#if NEP_HAVE_UCX

#include <dlfcn.h>
#include <string.h>

#include "transport/ucx.h"

enum { OLDEST_MINOR = 13 };

enum nep_status nep_ucx_lib_open(struct nep_ucx_lib *lib)
{
    memset(lib, 0, sizeof *lib);
    void *handle = dlopen("libucp.so.0", RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (handle == NULL) {
        const char *why = dlerror();
        return nep_fail(
            NEP_ERR_UNSUPPORTED,
            "transport ucx needs libucp.so.0, which did not load (%s): install UCX 1.13 "
            "or newer (Debian and Ubuntu: libucx0), or choose another transport",
            why != NULL ? why : "no reason given");
    }
    const char *missing = NULL;
/* dlsym's void * becomes a function pointer as POSIX describes it. */
#define X(name)                                                                                    \
    *(void **)&lib->name = dlsym(handle, #name);                                                   \
    missing = lib->name == NULL && missing == NULL ? #name : missing;
    NEP_UCX_FUNCTIONS(X)
#undef X
    if (missing != NULL) {
        dlclose(handle);
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "transport ucx: the UCX found has no %s: install UCX 1.13 or newer",
                        missing);
    }
    unsigned major, minor, release;
    lib->ucp_get_version(&major, &minor, &release);
    if (major != 1 || minor < OLDEST_MINOR) {
        dlclose(handle);
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "transport ucx: found UCX %u.%u.%u, which is not 1.%d or a newer 1.x",
                        major, minor, release, OLDEST_MINOR);
    }
    lib->handle = handle;
    return NEP_OK;
}

void nep_ucx_lib_close(struct nep_ucx_lib *lib)
{
    if (lib->handle != NULL) {
        dlclose(lib->handle);
        lib->handle = NULL;
    }
}

#endif
