// Splits a range of work over threads: OpenMP where the build has it (torch's own pool), else std::thread.
#pragma once

#include <cstdint>
#ifndef _OPENMP
#include <thread>
#include <vector>
#endif

namespace ladder {

// Calls body(begin, end) on disjoint parts of [0, count) whose boundaries are multiples of `grain`.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, int64_t threads, const Body& body) {
    const int64_t grains = (count + grain - 1) / grain;
    const int64_t parts = threads < grains ? threads : grains;
    if (parts <= 1) {
        if (count > 0) body(int64_t{0}, count);
        return;
    }
    const auto run_part = [&](int64_t part) {
        const int64_t begin = grains * part / parts * grain;
        const int64_t end = grains * (part + 1) / parts * grain;
        body(begin, end < count ? end : count);
    };
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(parts))
    for (int64_t part = 0; part < parts; ++part) run_part(part);
#else
    std::vector<std::thread> workers;
    for (int64_t part = 1; part < parts; ++part) workers.emplace_back(run_part, part);
    run_part(0);
    for (auto& worker : workers) worker.join();
#endif
}

}  // namespace ladder
