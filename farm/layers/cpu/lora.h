// What the LoRAs of several targets add to a product of their base's layer, each row its own: y += B A x, the factor
// alpha / r in B (arXiv 2106.09685, eq. 3).
#pragma once

#include <algorithm>

#include "threads.h"
#include "vectors.h"

namespace farm {

constexpr int kRankVectors = 8;  // of a low-rank state, that are worked out at once

enum Part : int { kQkv, kOut, kGateUp, kDown, kFc, kParts };

// Of one target and one product, [X, R] and then [R, Y]; none: the target does not change it. What is fused of several
// projections is zero outside of blocks: a span says for which ranks the outputs from one to another are not.
template <class T>
struct Factors {
  const T *down, *up;
  const int64_t* spans;  // [num_spans, 4]: first rank, last rank, first output, last output; outputs in whole vectors
  int64_t rank, num_spans;
};

// z = A x. A vector may reach into what lies behind A's row, at last into B: those lanes are left out of what follows.
template <class T, int kVectors>
void lower(const T* x, const T* down, int64_t inputs, int64_t rank, float* z) {
  Floats sums[kVectors] = {};
  for (int64_t i = 0; i < inputs; i++) {
    const float value = (float)x[i];
    for (int v = 0; v < kVectors; v++) sums[v] += load(down + i * rank + v * kLanes) * value;
  }
  for (int v = 0; v < kVectors; v++) store(z + v * kLanes, sums[v]);
}

template <class T, int kVectors = kRankVectors>
void lower_some(const T* x, const T* down, int64_t inputs, int64_t rank, int64_t vectors, float* z) {
  if constexpr (kVectors > 1)
    if (vectors < kVectors) return lower_some<T, kVectors - 1>(x, down, inputs, rank, vectors, z);
  lower<T, kVectors>(x, down, inputs, rank, z);
}

// Outputs `first` to `last` of one row.
template <class T>
void add_to_row(const Factors<T>& f, const T* x, T* y, int64_t inputs, int64_t outputs, int64_t first, int64_t last) {
  alignas(64) float z[kRankVectors * kLanes];
  constexpr int64_t kRanks = kRankVectors * kLanes;
  for (int64_t r = 0; r < f.rank; r += kRanks) {
    const int64_t ranks = std::min(f.rank - r, kRanks);
    lower_some(x, f.down + r, inputs, f.rank, (ranks + kLanes - 1) / kLanes, z);
    for (const int64_t* span = f.spans; span < f.spans + 4 * f.num_spans; span += 4) {
      const int64_t from = std::max(span[0], r), to = std::min(span[1], r + ranks), end = std::min(span[3], last);
      for (int64_t o = std::max(span[2], first); from < to && o < end; o += kLanes) {
        Floats sum = load_some(y + o, outputs - o);
        for (int64_t i = from; i < to; i++) sum += load_some(f.up + i * outputs + o, outputs - o) * z[i - r];
        store_some(y + o, sum, outputs - o);
      }
    }
  }
}

// `loras[b]` are the factors of sequence b's target, [layers, kParts], or none. Rows are shared out where there are enough
// of them, else the outputs of every row.
template <class T>
void add_loras(Thread& thread, const Factors<T>* const* loras, int64_t layer, Part part, const T* x, T* y,
               int64_t sequences, int64_t tokens, int64_t inputs, int64_t outputs) {
  const auto of = [&](int64_t b) { return loras[b] ? loras[b] + layer * kParts + part : nullptr; };
  bool some = false;
  for (int64_t b = 0; loras && b < sequences; b++) some |= of(b) && of(b)->down;
  if (!some) return;
  const int64_t rows = sequences * tokens, slices = rows < 2 * thread.count() ? thread.count() : 1;
  const int64_t blocks = (outputs + kLanes - 1) / kLanes;
  thread.each(slices * rows, [&](int64_t task) {
    const int64_t slice = task / rows, row = task % rows;
    const Factors<T>* own = of(row / tokens);
    if (!own || !own->down) return;
    const int64_t first = blocks * slice / slices * kLanes, last = blocks * (slice + 1) / slices * kLanes;
    add_to_row(*own, x + row * inputs, y + row * outputs, inputs, outputs, first, std::min(last, outputs));
  });
}

}  // namespace farm
