/* SPDX-License-Identifier: Apache-2.0 */
/*
 * RDMA devices, port by port: what is there, what nearep would choose and why, and whether memory
 * can be registered, by registering some. Without devices it says what is used instead.
 */
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tools/doctor.h"

#if NEP_HAVE_VERBS
#include "transport/verbs/verbs.h"

static double lane_gbits(uint8_t speed)
{
    switch (speed) {
    case 1:
        return 2.5;
    case 2:
        return 5;
    case 4:
    case 8:
        return 10;
    case 16:
        return 14;
    case 32:
        return 25;
    case 64:
        return 50;
    case 128:
        return 100;
    default:
        return 0;
    }
}

static double rate_gbits(const struct ibv_port_attr *port)
{
    static const struct {
        uint8_t width;
        uint32_t lanes;
    } widths[] = {{1, 1}, {2, 4}, {4, 8}, {8, 12}, {16, 2}};
    for (size_t i = 0; i < sizeof widths / sizeof widths[0]; i++) {
        if (widths[i].width == port->active_width) {
            return widths[i].lanes * lane_gbits(port->active_speed);
        }
    }
    return 0;
}

/* Each GID of the port, and which kind is taken. */
static void check_gids(struct doctor *doctor, const struct nep_verbs_api *api,
                       struct ibv_context *context, uint8_t port, const struct ibv_port_attr *attr)
{
    struct nep_verbs_gids gids;
    uint32_t only = doctor_config(doctor)->verbs_gid;
    enum nep_verbs_gid_kind best = NEP_VERBS_GID_NUM_KINDS;
    const char *name = context->device->name;
    nep_verbs_gids_read(api, context, port, (uint32_t)attr->gid_tbl_len, only, &gids);
    if (nep_verbs_gid_agree(&gids, &gids, &best) != NEP_OK) {
        doctor_say(doctor, DOCTOR_BAD, "GID",
                   only == UINT32_MAX ? "give its network interface an address (ip addr add)"
                                      : "unset NEP_VERBS_GID, or name an index that exists",
                   "%s port %u has none that can be used", name, port);
        return;
    }
    for (uint32_t kind = 0; kind < NEP_VERBS_GID_NUM_KINDS; kind++) {
        char text[48];
        if (gids.index[kind] < 0) {
            continue;
        }
        nep_verbs_gid_text(gids.raw[kind], text);
        bool is_taken = kind == best;
        bool is_poor = is_taken && (best == NEP_VERBS_GID_V2_LINK || best == NEP_VERBS_GID_V1);
        doctor_say(doctor, is_poor ? DOCTOR_NOTE : DOCTOR_FINE, "GID",
                   is_poor ? "give the interface a routable address (ip addr add)" : "",
                   "%s port %u index %d: %s, %s%s", name, port, gids.index[kind], text,
                   nep_verbs_gid_kind_name((enum nep_verbs_gid_kind)kind),
                   is_poor    ? "; taken, reaches this network segment only"
                   : is_taken ? "; taken when the other end has one of its kind too: the best here"
                              : "");
    }
}

static void check_port(struct doctor *doctor, const struct nep_verbs_api *api,
                       struct ibv_context *context, uint8_t port)
{
    struct ibv_port_attr attr;
    const char *name = context->device->name;
    if (api->query_port(context, port, &attr) != 0) {
        doctor_say(doctor, DOCTOR_BAD, "port", "see dmesg", "%s port %u cannot be queried: %s",
                   name, port, strerror(errno));
        return;
    }
    bool is_ethernet = attr.link_layer == IBV_LINK_LAYER_ETHERNET;
    if (attr.state != IBV_PORT_ACTIVE) {
        doctor_say(doctor, DOCTOR_NOTE, "port",
                   is_ethernet ? "bring its network interface up (ip link set ... up) and look at "
                                 "the cable"
                               : "look at the cable and the subnet manager",
                   "%s port %u is not active: it is not used", name, port);
        return;
    }
    doctor_say(doctor, DOCTOR_FINE, "port", "", "%s port %u: %s, %.1f Gb/s, MTU %u of at most %u",
               name, port, is_ethernet ? "Ethernet (RoCE)" : "InfiniBand", rate_gbits(&attr),
               128u << attr.active_mtu, 128u << attr.max_mtu);
    if (attr.active_mtu < IBV_MTU_4096 && is_ethernet) {
        doctor_say(doctor, DOCTOR_NOTE, "MTU",
                   "raise the interface's MTU at both ends and in the switches: 4200 allows 4096",
                   "%s port %u sends packets of %u bytes; 4096 cost less", name, port,
                   128u << attr.active_mtu);
    }
    check_gids(doctor, api, context, port, &attr);
}

/* Registers `bytes`; 0 or errno. */
static int try_register(const struct nep_verbs_api *api, struct ibv_pd *pd, size_t bytes,
                        unsigned access)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        return errno;
    }
    errno = 0;
    struct ibv_mr *mr = api->reg_mr(pd, memory, bytes, access);
    int error = mr == NULL ? errno : 0;
    if (mr != NULL) {
        api->dereg_mr(mr);
    }
    munmap(memory, bytes);
    return error;
}

static void check_registration(struct doctor *doctor, const struct nep_verbs_api *api,
                               struct ibv_context *context)
{
    const unsigned access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE;
    const size_t sizes[] = {4096, 64u << 20};
    const char *name = context->device->name;
    struct ibv_pd *pd = api->alloc_pd(context);
    if (pd == NULL) {
        doctor_say(doctor, DOCTOR_BAD, "registration", "see dmesg",
                   "%s gives no protection domain: %s", name, strerror(errno));
        return;
    }
    int error = 0;
    for (size_t i = 0; i < 2 && error == 0; i++) {
        error = try_register(api, pd, sizes[i], access);
        if (error != 0) {
            nep_verbs_register_failed(name, "memory", sizes[i], error);
            doctor_say(doctor, DOCTOR_BAD, "registration", "what the sentence says", "%s",
                       nep_last_message());
        }
    }
    int relaxed = try_register(api, pd, 4096, access | IBV_ACCESS_RELAXED_ORDERING);
    api->dealloc_pd(pd);
    if (error == 0) {
        doctor_say(doctor, DOCTOR_FINE, "registration", "", "%s: 64 MiB of host memory%s", name,
                   relaxed == 0 ? ", relaxed ordering taken" : "; relaxed ordering refused");
    }
}

static void check_device(struct doctor *doctor, const struct nep_verbs_api *api,
                         struct ibv_device *device)
{
    struct ibv_device_attr attr;
    const char *name = api->get_device_name(device);
    struct ibv_context *context = api->open_device(device);
    if (context == NULL) {
        doctor_say(doctor, DOCTOR_BAD, "device",
                   "give this user or container /dev/infiniband (docker --device=/dev/infiniband)",
                   "%s cannot be opened: %s", name, strerror(errno));
        return;
    }
    if (api->query_device(context, &attr) != 0) {
        doctor_say(doctor, DOCTOR_BAD, "device", "see dmesg", "%s cannot be queried", name);
    } else {
        doctor_say(doctor, DOCTOR_FINE, "device", "",
                   "%s: firmware %.40s, %d QPs, %d completions in a queue, %d receives shared",
                   name, attr.fw_ver[0] == '\0' ? "none" : attr.fw_ver, attr.max_qp, attr.max_cqe,
                   attr.max_srq_wr);
        for (uint8_t port = 1; port <= attr.phys_port_cnt; port++) {
            check_port(doctor, api, context, port);
        }
        check_registration(doctor, api, context);
    }
    api->close_device(context);
}

/* ---- GPUs beside NICs ------------------------------------------------------------------------ */

static bool read_line(const char *path, char *text, size_t size)
{
    FILE *file = fopen(path, "re");
    bool found = file != NULL && fgets(text, (int)size, file) != NULL;
    if (file != NULL) {
        fclose(file);
    }
    return found;
}

/* How many steps of two PCI paths agree: more is nearer. */
static uint32_t steps_shared(const char *a, const char *b)
{
    uint32_t steps = 0;
    for (size_t i = 0; a[i] != '\0' && a[i] == b[i]; i++) {
        steps += a[i] == '/';
    }
    return steps;
}

static void check_gpu(struct doctor *doctor, struct ibv_device **list, int num_devices,
                      const char *address)
{
    char link[320], gpu[512], nic[512], nearest[NEP_VERBS_NAME] = "none";
    uint32_t most = 0;
    snprintf(link, sizeof link, "/sys/bus/pci/devices/%.40s", address);
    ssize_t gpu_len = readlink(link, gpu, sizeof gpu - 1);
    for (int i = 0; i < num_devices && gpu_len > 0; i++) {
        gpu[gpu_len] = '\0';
        snprintf(link, sizeof link, "/sys/class/infiniband/%.63s/device", list[i]->name);
        char real[512];
        ssize_t len = readlink(link, nic, sizeof nic - 1);
        if (len <= 0) {
            continue; /* a device without hardware */
        }
        nic[len] = '\0';
        const char *tail = strstr(nic, "/pci"), *mine = strstr(gpu, "/pci");
        snprintf(real, sizeof real, "%s", tail == NULL ? nic : tail);
        uint32_t steps = steps_shared(mine == NULL ? gpu : mine, real);
        if (steps > most) {
            most = steps;
            snprintf(nearest, sizeof nearest, "%s", list[i]->name);
        }
    }
    doctor_say(doctor, DOCTOR_FINE, "GPU", "", "%s: nearest RDMA device %s (%u PCI steps shared)",
               address, nearest, most);
}

/* NVIDIA GPUs, how their memory could be registered, and what stands between them and a NIC. */
static void check_gpus(struct doctor *doctor, const struct nep_verbs_api *api,
                       struct ibv_device **list, int num_devices)
{
    uint32_t num_gpus = 0;
    DIR *dir = opendir("/sys/bus/pci/devices");
    for (struct dirent *entry; dir != NULL && (entry = readdir(dir)) != NULL;) {
        char path[320], vendor[32], class[32];
        snprintf(path, sizeof path, "/sys/bus/pci/devices/%.40s/vendor", entry->d_name);
        if (!read_line(path, vendor, sizeof vendor) || strncmp(vendor, "0x10de", 6) != 0) {
            continue;
        }
        snprintf(path, sizeof path, "/sys/bus/pci/devices/%.40s/class", entry->d_name);
        if (read_line(path, class, sizeof class) && strncmp(class, "0x03", 4) == 0) {
            check_gpu(doctor, list, num_devices, entry->d_name);
            num_gpus++;
        }
    }
    if (dir != NULL) {
        closedir(dir);
    }
    if (num_gpus == 0) {
        return;
    }
    bool has_peermem = access("/sys/module/nvidia_peermem", F_OK) == 0;
    doctor_say(doctor, api->reg_dmabuf_mr != NULL || has_peermem ? DOCTOR_FINE : DOCTOR_NOTE,
               "GPU memory",
               api->reg_dmabuf_mr != NULL || has_peermem ? "" : "modprobe nvidia_peermem",
               "libibverbs %s dma-buf, nvidia_peermem is %sloaded",
               api->reg_dmabuf_mr != NULL ? "knows" : "does not know", has_peermem ? "" : "not ");
    if (access("/sys/kernel/iommu_groups/0", F_OK) == 0) {
        doctor_say(doctor, DOCTOR_NOTE, "IOMMU",
                   "iommu=pt on the kernel's command line; ACS off in the switches above GPU and "
                   "NIC (setpci), on bare metal",
                   "it is on: traffic between GPU and NIC may take the way over the processor");
    }
}

void doctor_check_verbs(struct doctor *doctor)
{
    struct nep_verbs_api api;
    struct ibv_device **list;
    int num_devices;
    if (nep_verbs_api_load(&api) != NEP_OK) {
        return; /* doctor_check_transports has said it */
    }
    if (nep_verbs_api_devices(&api, &list, &num_devices) == NEP_OK) {
        for (int i = 0; i < num_devices; i++) {
            check_device(doctor, &api, list[i]);
        }
        check_gpus(doctor, &api, list, num_devices);
        api.free_device_list(list);
    } else {
        doctor_say(doctor, DOCTOR_NOTE, "RDMA",
                   "nothing, to try nearep out; a fast network between machines needs devices",
                   "no device here: shm inside this machine and ucx between machines are used "
                   "instead");
    }
    nep_verbs_api_unload(&api);
}
#else
void doctor_check_verbs(struct doctor *doctor)
{
    doctor_say(
        doctor, DOCTOR_NOTE, "RDMA", "install libibverbs-dev and build nearep again",
        "built without infiniband/verbs.h: shm inside a machine and ucx between machines are "
        "used instead");
}
#endif
