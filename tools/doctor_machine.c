/* SPDX-License-Identifier: Apache-2.0 */
/* Cores, instructions, memory that processes share. Tried, not read off: a limit that a container
 * sets shows only when something is allocated. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "tools/doctor.h"
#include "transport/topology.h"

void doctor_check_machine(struct doctor *doctor)
{
    struct nep_launch_env env = {.rank = UINT32_MAX};
    uint32_t num_cores = nep_topology_num_cores();
    if (nep_launch_env_read(&env) != NEP_OK) {
        doctor_say(doctor, DOCTOR_BAD, "launcher", "unset or correct the variable that it names",
                   "%s", nep_last_message());
    } else if (env.rank == UINT32_MAX) {
        doctor_say(doctor, DOCTOR_NOTE, "launcher", "",
                   "none: give rank and size to nep_comm_create, or start with torchrun, mpirun or "
                   "srun");
    } else {
        doctor_say(doctor, DOCTOR_FINE, "launcher", "", "%s: rank %u of %u", env.launcher, env.rank,
                   env.num_ranks);
    }
    if (env.rank != UINT32_MAX && env.local_size != UINT32_MAX && env.local_size > num_cores) {
        doctor_say(doctor, DOCTOR_NOTE, "cores",
                   "use fewer ranks per machine, or raise the container's CPU quota",
                   "%u cores for %u ranks: waits sleep instead of spinning", num_cores,
                   env.local_size);
    } else {
        doctor_say(doctor, DOCTOR_FINE, "cores", "", "%u usable", num_cores);
    }
#if defined(__x86_64__)
    bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    doctor_say(doctor, DOCTOR_FINE, "instructions", "", "%s",
               has_avx512                       ? "AVX-512"
               : __builtin_cpu_supports("avx2") ? "AVX2"
                                                : "plain C only: neither AVX2 nor AVX-512");
#else
    doctor_say(doctor, DOCTOR_FINE, "instructions", "", "plain C");
#endif
    if (access("/proc/sys/kernel/random/boot_id", R_OK) != 0 || access("/proc/self/ns/ipc", F_OK)) {
        doctor_say(doctor, DOCTOR_BAD, "nodes",
                   "mount /proc, or set NEP_NODE to one name for all ranks of a machine",
                   "/proc does not tell which ranks share memory: %s", strerror(errno));
    } else {
        doctor_say(doctor, DOCTOR_FINE, "nodes", "", "ranks that share memory can be found");
    }
}

/* Maps and touches one mebibyte of a shared file; 0, or errno. */
static int try_shared(unsigned flags)
{
    size_t bytes = flags & MFD_HUGETLB ? 2u << 20 : 1u << 20;
    int fd = memfd_create("nep-info", MFD_CLOEXEC | flags);
    if (fd < 0) {
        return errno;
    }
    int error = 0;
    void *base = MAP_FAILED;
    if (ftruncate(fd, (off_t)bytes) == 0) {
        base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    }
    if (base == MAP_FAILED) {
        error = errno;
    } else {
        munmap(base, bytes);
    }
    close(fd);
    return error;
}

static void check_shm(struct doctor *doctor)
{
    struct statvfs shm;
    if (statvfs("/dev/shm", &shm) != 0) {
        doctor_say(doctor, DOCTOR_NOTE, "/dev/shm", "mount -t tmpfs tmpfs /dev/shm",
                   "not there: %s", strerror(errno));
        return;
    }
    uint64_t free_mib = ((uint64_t)shm.f_bavail * shm.f_frsize) >> 20;
    bool is_small = free_mib < 1024;
    doctor_say(doctor, is_small ? DOCTOR_NOTE : DOCTOR_FINE, "/dev/shm",
               is_small ? "docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm" : "",
               "%llu MiB free%s", (unsigned long long)free_mib,
               is_small ? "; a container's default of 64 MiB is too small for most shapes" : "");
}

void doctor_check_memory(struct doctor *doctor)
{
    int error = try_shared(0);
    if (error != 0) {
        doctor_say(doctor, DOCTOR_BAD, "shared memory",
                   "raise the memory limit of this container or user",
                   "memory that processes share cannot be made: %s", strerror(error));
    } else {
        doctor_say(doctor, DOCTOR_FINE, "shared memory", "", "memfd works");
    }
    check_shm(doctor);
    error = try_shared(MFD_HUGETLB);
    if (error != 0) {
        doctor_say(doctor, DOCTOR_NOTE, "huge pages", "",
                   "none reserved (%s): small pages are used; sysctl vm.nr_hugepages reserves some",
                   strerror(error));
    } else {
        doctor_say(doctor, DOCTOR_FINE, "huge pages", "", "2 MiB pages can be had");
    }
    struct rlimit lock;
    if (getrlimit(RLIMIT_MEMLOCK, &lock) == 0 && lock.rlim_cur < (256u << 20)) {
        doctor_say(doctor, DOCTOR_NOTE, "locked memory",
                   "ulimit -l unlimited (in a container: --ulimit memlock=-1)",
                   "at most %llu KiB: RDMA registration of larger regions will fail",
                   (unsigned long long)(lock.rlim_cur >> 10));
    } else {
        doctor_say(doctor, DOCTOR_FINE, "locked memory", "", "enough may be locked");
    }
}
