// The tables of narrow matrices: which codes stand for all others.
#pragma once

#include <cstdint>
#include <vector>

namespace edgellm {

// Of `values`, rising, with weights >= 0: the positions of the `count` (fewer than there are) by which the others are
// replaced at the least sum of weight * squared distance; rising. One-dimensional k-means, solved exactly by dynamic
// programming (Wang and Song, R Journal 3/2, 2011), with centres that are values themselves. Takes O(count * n^2).
std::vector<int> best_values(const std::vector<int> & values, const std::vector<double> & weights, int count);

}  // namespace edgellm
