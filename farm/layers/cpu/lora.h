// What the LoRAs of several targets add to a product of their base's layer, each row its own: y += B A x, the factor
// alpha / r in B (arXiv 2106.09685, eq. 3).
#pragma once

#include <algorithm>

#include "ahead.h"
#include "threads.h"
#include "vectors.h"

namespace farm {

constexpr int kRankVectors = 8;                // of a low-rank state, that are worked out at once
constexpr int kRanks = kRankVectors * kLanes;  // as many numbers
constexpr int kTokens = 4;                     // of one sequence, that share a reading of its factors
constexpr int kSums = 4;                       // at least so many side by side: one that waits for itself takes several times as long

enum Part : int { kQkv, kOut, kGateUp, kDown, kFc, kParts };

// Of one target and one product, [X, R] and then [R, Y]; none: the target does not change it. What is fused of several
// projections is zero outside of blocks: a span says for which ranks the outputs from one to another are not.
template <class T>
struct Factors {
  const T *down, *up;
  const int64_t* spans;  // [num_spans, 4]: first rank, last rank, first output, last output; outputs in whole vectors
  int64_t rank, num_spans;
};

// Into how many sums a number of a low-rank state is divided: the same for any number of tokens, so that their bits are.
constexpr int apart(int vectors) { return vectors < kSums ? (kSums + vectors - 1) / vectors : 1; }

// z = A x of some tokens, `kRanks` numbers each. A vector may reach into what lies behind A's row, at last into B: those
// lanes are left out of what follows.
template <class T, int kVectors, int kCount>
void lower(const T* x, const T* down, int64_t inputs, int64_t rank, float* z) {
  constexpr int kApart = apart(kVectors);
  Floats sums[kCount][kApart][kVectors] = {};
  const auto add = [&](int64_t i, int part) {
    for (int v = 0; v < kVectors; v++) {
      const Floats weights = load(down + i * rank + v * kLanes);
      for (int m = 0; m < kCount; m++)
        sums[m][part][v] = multiply_add(weights, Floats{} + (float)x[m * inputs + i], sums[m][part][v]);
    }
  };
  int64_t i = 0;
  for (; i + kApart <= inputs; i += kApart)
    for (int part = 0; part < kApart; part++) add(i + part, part);
  for (; i < inputs; i++) add(i, 0);
  for (int m = 0; m < kCount; m++)
    for (int v = 0; v < kVectors; v++) {
      for (int part = 1; part < kApart; part++) sums[m][0][v] += sums[m][part][v];
      store(z + m * kRanks + v * kLanes, sums[m][0][v]);
    }
}

template <class T, int kCount, int kVectors = kRankVectors>
void lower_some(const T* x, const T* down, int64_t inputs, int64_t rank, int64_t vectors, float* z) {
  if constexpr (kVectors > 1)
    if (vectors < kVectors) return lower_some<T, kCount, kVectors - 1>(x, down, inputs, rank, vectors, z);
  constexpr int kFit = std::max(1, kRegisters * 3 / 4 / (apart(kVectors) * kVectors));  // whose sums are in registers
  constexpr int kAtOnce = std::min(kFit, kCount);
  int m = 0;
  for (; m + kAtOnce <= kCount; m += kAtOnce)
    lower<T, kVectors, kAtOnce>(x + m * inputs, down, inputs, rank, z + m * kRanks);
  for (; m < kCount; m++) lower<T, kVectors, 1>(x + m * inputs, down, inputs, rank, z + m * kRanks);
}

// Outputs `first` to `last` of some tokens of one sequence.
template <class T, int kCount = kTokens>
void add_to_rows(const Factors<T>& f, const T* x, T* y, int64_t count, int64_t inputs, int64_t outputs, int64_t first,
                 int64_t last) {
  if constexpr (kCount > 1)
    if (count < kCount) return add_to_rows<T, kCount - 1>(f, x, y, count, inputs, outputs, first, last);
  alignas(64) float z[kCount * kRanks];
  for (int64_t r = 0; r < f.rank; r += kRanks) {
    const int64_t ranks = std::min<int64_t>(f.rank - r, kRanks);
    lower_some<T, kCount>(x, f.down + r, inputs, f.rank, (ranks + kLanes - 1) / kLanes, z);
    for (const int64_t* span = f.spans; span < f.spans + 4 * f.num_spans; span += 4) {
      const int64_t from = std::max(span[0], r), to = std::min(span[1], r + ranks), end = std::min(span[3], last);
      for (int64_t o = std::max(span[2], first); from < to && o < end; o += kLanes) {
        Floats sums[kCount];
        for (int m = 0; m < kCount; m++) sums[m] = load_some(y + m * outputs + o, outputs - o);
        for (int64_t i = from; i < to; i++) {
          const Floats weights = load_some(f.up + i * outputs + o, outputs - o);
          for (int m = 0; m < kCount; m++)
            sums[m] = multiply_add(weights, Floats{} + z[m * kRanks + i - r], sums[m]);
        }
        for (int m = 0; m < kCount; m++) store_some(y + m * outputs + o, sums[m], outputs - o);
      }
    }
  }
}

// Whether rows are shared out among threads, whole; else every thread takes a slice of the outputs of all of them.
inline bool shares_rows(const Thread& thread, int64_t rows) {
  return rows % thread.count() == 0 || rows >= 2 * thread.count();
}

// Calls body(sequence, row, count) for runs of rows of one sequence, of at most kTokens.
template <class Body>
void each_run(int64_t first, int64_t last, int64_t tokens, const Body& body) {
  for (int64_t row = first, count; row < last; row += count) {
    count = std::min<int64_t>({kTokens, last - row, tokens - row % tokens});
    body(row / tokens, row, count);
  }
}

// What the sequences of a call have of their own of one product, `tokens` rows each.
template <class T>
struct Loras {
  const Factors<T>* const* tables;  // [B]: of each sequence's target, [layers, kParts], or none
  int64_t layer;
  Part part;
  int64_t sequences, tokens, inputs, outputs;

  int64_t rows() const { return sequences * tokens; }
  const Factors<T>* of(int64_t b) const {  // none: the product stays as it is
    const Factors<T>* own = tables[b] ? tables[b] + layer * kParts + part : nullptr;
    return own && own->down ? own : nullptr;
  }
};

// Asks for what this thread's rows are about to add to the product: their factors, each once.
template <class T>
void expect(const Thread& thread, Ahead& ahead, const Loras<T>& l) {
  ahead.clear();
  if (!shares_rows(thread, l.rows())) return;
  const auto [first, last] = thread.share(l.rows());
  const Factors<T>* const* begin = l.tables + first / l.tokens;
  for (int64_t b = first / l.tokens; b * l.tokens < last; b++) {
    const Factors<T>* own = l.of(b);
    if (!own || std::find(begin, l.tables + b, l.tables[b]) != l.tables + b) continue;
    ahead.add(own->down, l.inputs * own->rank * sizeof(T));
    for (const int64_t* span = own->spans; span < own->spans + 4 * own->num_spans; span += 4)
      for (int64_t r = span[0]; r < span[1]; r++)
        ahead.add(own->up + r * l.outputs + span[2], (span[3] - span[2]) * sizeof(T));
  }
}

// y += B A x. Where rows are shared out threads do not meet behind it: what works on the same rows, by `each`, may follow
// at once.
template <class T>
void add(Thread& thread, const Loras<T>& l, const T* x, T* y) {
  bool some = false;
  for (int64_t b = 0; b < l.sequences; b++) some |= l.of(b) != nullptr;
  if (!some) return;
  const auto add_some = [&](int64_t from, int64_t to, int64_t first, int64_t last) {
    each_run(from, to, l.tokens, [&](int64_t b, int64_t row, int64_t count) {
      if (const Factors<T>* own = l.of(b))
        add_to_rows(*own, x + row * l.inputs, y + row * l.outputs, count, l.inputs, l.outputs, first, last);
    });
  };
  if (shares_rows(thread, l.rows())) {
    const auto [first, last] = thread.share(l.rows());
    return add_some(first, last, 0, l.outputs);
  }
  const auto [first, last] = thread.share((l.outputs + kLanes - 1) / kLanes);
  add_some(0, l.rows(), first * kLanes, std::min(last * kLanes, l.outputs));
  thread.meet();
}

}  // namespace farm
