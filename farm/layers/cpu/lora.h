// What the LoRAs of several targets add to a product of their base's layer, each row its own: y += B A x, the factor
// alpha / r in B (arXiv 2106.09685, eq. 3).
#pragma once

#include "threads.h"
#include "vectors.h"

namespace farm {

constexpr int kRankVectors = 8;  // of a low-rank state, that are worked out at once

enum Part : int { kQkv, kOut, kGateUp, kDown, kParts };

// The factors of the first target, [X, R] and then [R, Y]; none: no target changes this product.
template <class T>
struct Factors {
  const T *down, *up;
  int64_t rank;
};

template <class T>
struct Loras {
  const Factors<T>* factors;  // [layers, kParts]
  const int64_t* which;       // [B]: the LoRA of each sequence, -1 for none
  int64_t target;             // numbers from one target's factors to the next one's
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
    const int64_t ranks = f.rank - r < kRanks ? f.rank - r : kRanks;
    lower_some(x, f.down + r, inputs, f.rank, (ranks + kLanes - 1) / kLanes, z);
    for (int64_t o = first; o < last; o += kLanes) {
      const T* up = f.up + r * outputs + o;
      Floats sum = load_some(y + o, last - o);
      for (int64_t i = 0; i < ranks; i++) sum += load_some(up + i * outputs, last - o) * z[i];
      store_some(y + o, sum, last - o);
    }
  }
}

// Rows are shared out where there are enough of them, else the outputs of every row.
template <class T>
void add_loras(Thread& thread, const Loras<T>* loras, int64_t layer, Part part, const T* x, T* y, int64_t sequences,
               int64_t tokens, int64_t inputs, int64_t outputs) {
  if (!loras || !loras->factors[layer * kParts + part].down) return;
  const Factors<T>& first = loras->factors[layer * kParts + part];
  const int64_t rows = sequences * tokens, slices = rows < 2 * thread.count() ? thread.count() : 1;
  const int64_t blocks = (outputs + kLanes - 1) / kLanes;
  thread.each(slices * rows, [&](int64_t task) {
    const int64_t slice = task / rows, row = task % rows, which = loras->which[row / tokens];
    if (which < 0) return;
    const Factors<T> own = {first.down + which * loras->target, first.up + which * loras->target, first.rank};
    const int64_t end = blocks * (slice + 1) / slices * kLanes;
    add_to_row(own, x + row * inputs, y + row * outputs, inputs, outputs, blocks * slice / slices * kLanes,
               end < outputs ? end : outputs);
  });
}

}  // namespace farm
