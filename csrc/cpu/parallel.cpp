#include "parallel.h"

#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <string>

namespace kolors_fast {
namespace {

// The entry points of an OpenMP run-time, as compilers call them. libgomp, libomp and libiomp5 all export these.
struct OpenMP {
    void (*parallel)(void (*body)(void *), void *context, unsigned threads, unsigned flags) = nullptr;
    int (*max_threads)() = nullptr;
    int (*thread)() = nullptr;
    int (*team_size)() = nullptr;
    int (*in_parallel)() = nullptr;

    explicit OpenMP(void *library) {
        find(library, "GOMP_parallel", parallel);
        find(library, "omp_get_max_threads", max_threads);
        find(library, "omp_get_thread_num", thread);
        find(library, "omp_get_num_threads", team_size);
        find(library, "omp_in_parallel", in_parallel);
    }

    bool complete() const { return parallel && max_threads && thread && team_size && in_parallel; }

  private:
    template <typename Function> static void find(void *library, const char *name, Function &function) {
        if (library)
            function = reinterpret_cast<Function>(dlsym(library, name));
    }
};

int remember_openmp(dl_phdr_info *info, size_t, void *found) {
    const char *path = info->dlpi_name;
    const char *slash = std::strrchr(path, '/');
    const char *file = slash ? slash + 1 : path;
    for (const char *stem : {"libgomp", "libiomp5", "libomp"})
        if (std::strncmp(file, stem, std::strlen(stem)) == 0) {
            *static_cast<std::string *>(found) = path;
            return 1;
        }
    return 0;
}

// Linking libgomp would bring a second pool wherever PyTorch ships it under another soname (libgomp-<hash>.so.1), and
// fail where only PyTorch has it. So take the copy that is already loaded, whatever its name.
void *open_openmp() {
    std::string path;
    dl_iterate_phdr(remember_openmp, &path);
    return path.empty() ? dlopen("libgomp.so.1", RTLD_LAZY | RTLD_GLOBAL)
                        : dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
}

const OpenMP &openmp() {
    static const OpenMP found(open_openmp());
    return found;
}

struct Region {
    int64_t count;
    RangeBody body;
    const void *context;
};

void run_share(void *pointer) {
    const Region &region = *static_cast<const Region *>(pointer);
    const int64_t team = openmp().team_size(), thread = openmp().thread();
    const int64_t share = region.count / team, rest = region.count % team;
    const int64_t begin = thread * share + (thread < rest ? thread : rest);
    const int64_t end = begin + share + (thread < rest ? 1 : 0);
    if (begin < end)
        region.body(region.context, begin, end, static_cast<int>(thread));
}

} // namespace

int max_threads() {
    const OpenMP &omp = openmp();
    return omp.complete() && !omp.in_parallel() ? omp.max_threads() : 1;
}

void parallel_ranges(int64_t count, int threads, RangeBody body, const void *context) {
    if (threads > count)
        threads = static_cast<int>(count);
    if (threads <= 1) {
        if (count > 0)
            body(context, 0, count, 0);
        return;
    }
    Region region{count, body, context};
    openmp().parallel(run_share, &region, static_cast<unsigned>(threads), 0);
}

} // namespace kolors_fast
