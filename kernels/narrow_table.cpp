// The tables of narrow matrices. See narrow_table.h.
#include "narrow_table.h"

#include <algorithm>
#include <limits>

namespace edgellm {
namespace {

struct Run {
    double cost;
    int centre;
};

// What each run [first, last] of values costs with its best centre, (n, n).
std::vector<Run> cost_of_runs(const std::vector<int> & values, const std::vector<double> & weights) {
    const size_t n = values.size();
    std::vector<Run> runs(n * n);
    for (size_t first = 0; first < n; ++first) {
        // Values are taken from the first on, so that sums do not cancel each other out.
        double weight = 0, sum = 0, squares = 0;
        size_t centre = first;
        const auto away = [&](size_t i) { return static_cast<double>(values[i] - values[first]); };
        for (size_t last = first; last < n; ++last) {
            weight += weights[last];
            sum += weights[last] * away(last);
            squares += weights[last] * away(last) * away(last);
            const double mean = weight > 0 ? sum / weight : 0;  // the best centre is the value closest to it
            while (centre < last && away(centre + 1) - mean < mean - away(centre)) ++centre;
            const double cost = squares - 2 * away(centre) * sum + away(centre) * away(centre) * weight;
            runs[first * n + last] = {std::max(cost, 0.0), static_cast<int>(centre)};
        }
    }
    return runs;
}

}  // namespace

std::vector<int> best_values(const std::vector<int> & values, const std::vector<double> & weights, int count) {
    const size_t n = values.size();
    const std::vector<Run> runs = cost_of_runs(values, weights);
    // best[last]: the least cost of values [0, last] in as many runs as were counted; begins[run][last]: its last run.
    std::vector<double> best(n), next(n);
    std::vector<std::vector<size_t>> begins(static_cast<size_t>(count), std::vector<size_t>(n, 0));
    for (size_t last = 0; last < n; ++last) best[last] = runs[last].cost;
    for (size_t run = 1; run < static_cast<size_t>(count); ++run) {
        std::fill(next.begin(), next.end(), std::numeric_limits<double>::infinity());
        for (size_t last = run; last < n; ++last)
            for (size_t first = run; first <= last; ++first) {
                const double cost = best[first - 1] + runs[first * n + last].cost;
                if (cost < next[last]) {
                    next[last] = cost;
                    begins[run][last] = first;
                }
            }
        best.swap(next);
    }
    std::vector<int> chosen(static_cast<size_t>(count));
    size_t last = n - 1;
    for (size_t run = chosen.size(); run-- > 0;) {
        const size_t first = begins[run][last];
        chosen[run] = runs[first * n + last].centre;
        last = first - 1;
    }
    return chosen;
}

}  // namespace edgellm
