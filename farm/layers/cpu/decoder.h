// The layers of a decoder over a slot cache, without leaving C++ between operators: a step of few rows is otherwise
// bound by calls.
#pragma once

#include <algorithm>
#include <vector>

#include "attention.h"
#include "elementwise.h"
#include "lora.h"
#include "product.h"

namespace farm {

template <class T>
struct Mlp {
  const T *gate_up, *down;  // none: there is no such MLP
  int64_t width;
};

// A draft's layer has no norm before attention and a second MLP, its private expert, over the same input.
template <class T>
struct Layer {
  const T *input_norm, *qkv, *qkv_bias, *q_norm, *k_norm, *out, *out_bias, *post_norm;
  Mlp<T> mlps[2];
};

template <class T>
struct Decoder {
  const Layer<T>* layers;
  const T* fc;  // [H, 2 H] of a draft, in front of its layer
  int64_t num_layers, hidden, heads, kv_heads, size;
  double eps;
};

template <class T>
struct Call {
  T* x;                        // [M, H], written over
  const T *embedded, *hidden;  // [M, H], what a draft's x is made of; where tokens are named, `embedded` is the whole table
  const T *cos, *sin, *mask;    // tables of positions; see Attention
  const int64_t *positions, *offsets;  // [M]: of the token, and of its entry among its row's
  T* cache;  // keys of the first layer's first row
  // M (3 H + (N + 2 G) D + N D + the widest MLP) numbers; with LoRAs twice the widest MLP more, with MLPs of the rows' own
  // the widest of these more.
  T* scratch;
  const Factors<T>* const* loras;  // [B], see Loras; none: no row has one
  const Mlp<T>* const* own;        // [B]: an MLP of each sequence's own, behind those of the layer; none: there are none
  int64_t sequences, tokens, context;
  int64_t cache_layer, kv_sequence, kv_head, mask_sequence, mask_row;  // in numbers
};

// What a token's q/k/v go through before attention: norms of heads, rotation, and keys and values into the cache, where all
// heads' keys lie in front of all values, as they do in q/k/v.
template <class T>
void place(Thread& thread, const Decoder<T>& d, const Layer<T>& layer, const Call<T>& c, T* qkv, T* cache) {
  const int64_t all = d.heads + 2 * d.kv_heads;
  thread.each(c.sequences * c.tokens, [&](int64_t row) {
    T *x = qkv + row * all * d.size, *kv = x + d.heads * d.size;
    for (int64_t head = 0; layer.q_norm && head < d.heads + d.kv_heads; head++)
      norm_of_one(x + head * d.size, head < d.heads ? layer.q_norm : layer.k_norm, x + head * d.size, d.size, (float)d.eps);
    turn(x, c.cos + c.positions[row] * d.size, c.sin + c.positions[row] * d.size, d.heads + d.kv_heads, d.size);
    T* entry = cache + row / c.tokens * c.kv_sequence + c.offsets[row] * d.size;
    for (int64_t head = 0; head < 2 * d.kv_heads; head++)
      std::memcpy(entry + head * c.kv_head, kv + head * d.size, d.size * sizeof(T));
  });
}

// A product, and what sequences have of their own of it. Behind those of q/k/v, of the attention's output and of the gate
// every row is worked on by itself.
template <class T>
void linear_and_loras(Thread& thread, Ahead& ahead, const Call<T>& c, int64_t layer, Part part, const Task<T>& task) {
  if (!c.loras) return linear<T>(thread, task);
  const Loras<T> loras = {c.loras, layer, part, c.sequences, c.tokens, task.inputs, task.outputs};
  expect(thread, ahead, loras);
  linear<T>(thread, task, &ahead);
  add(thread, loras, task.x, task.y);
  if (part == kDown || part == kFc) thread.meet();
}

// x = fc of the embedding beside the hidden state (EAGLE, arXiv 2401.15077).
template <class T>
void join(Thread& thread, Ahead& ahead, const Decoder<T>& d, const Call<T>& c, const int64_t* tokens, T* pairs) {
  const int64_t rows = c.sequences * c.tokens, bytes = d.hidden * sizeof(T);
  thread.each(rows, [&](int64_t row) {
    const T* embedded = c.embedded + (tokens ? tokens[row] : row) * d.hidden;
    std::memcpy(pairs + row * 2 * d.hidden, embedded, bytes);
    std::memcpy(pairs + row * 2 * d.hidden + d.hidden, c.hidden + row * d.hidden, bytes);
  });
  linear_and_loras<T>(thread, ahead, c, 0, kFc,
                      {pairs, d.fc, nullptr, nullptr, c.x, rows, 2 * d.hidden, d.hidden, kAsTheyAre});
}

// x += each sequence's own MLP of what is normed.
template <class T>
void add_own(Thread& thread, const Decoder<T>& d, const Call<T>& c, const T* normed, T* gated) {
  const int64_t rows = c.tokens;
  int64_t widest = 0;
  for (int64_t b = 0; b < c.sequences; b++) widest = std::max(widest, c.own[b]->width);
  linear_each<T>(thread, c.sequences, 2 * widest, [&](int64_t b) {
    return Task<T>{normed + b * rows * d.hidden, c.own[b]->gate_up, nullptr, nullptr, gated + b * rows * widest,
                   rows, d.hidden, 2 * c.own[b]->width, kGated};
  });
  linear_each<T>(thread, c.sequences, d.hidden, [&](int64_t b) {
    T* x = c.x + b * rows * d.hidden;
    return Task<T>{gated + b * rows * widest, c.own[b]->down, nullptr, x, x, rows, c.own[b]->width, d.hidden, kAsTheyAre};
  });
}

template <class T>
void decode(Thread& thread, const Decoder<T>& d, const Call<T>& c, const int64_t* tokens = nullptr) {
  const int64_t rows = c.sequences * c.tokens, all = d.heads + 2 * d.kv_heads, mixed_width = d.heads * d.size;
  T *normed = c.scratch, *pairs = normed + rows * d.hidden, *qkv = pairs + rows * 2 * d.hidden;
  T *mixed = qkv + rows * all * d.size, *gated = mixed + rows * mixed_width;
  Ahead ahead;
  if (d.fc) join(thread, ahead, d, c, tokens, pairs);
  for (int64_t index = 0; index < d.num_layers; index++) {
    const Layer<T>& layer = d.layers[index];
    T* cache = c.cache + index * c.cache_layer;
    if (layer.input_norm) rms_norm(thread, c.x, layer.input_norm, normed, rows, d.hidden, (float)d.eps);
    const T* in = layer.input_norm ? normed : c.x;
    const auto product = [&](Part part, const Task<T>& task) { linear_and_loras(thread, ahead, c, index, part, task); };
    product(kQkv, {in, layer.qkv, layer.qkv_bias, nullptr, qkv, rows, d.hidden, all * d.size, kAsTheyAre});
    place(thread, d, layer, c, qkv, cache);
    attend<T>(thread, {qkv, cache, cache + d.kv_heads * c.kv_head, c.mask, c.mask ? nullptr : c.offsets, mixed,
                       c.sequences, c.tokens, d.kv_heads, d.heads / d.kv_heads, d.size, c.context,
                       c.tokens * all * d.size, all * d.size, c.kv_sequence, c.kv_head, c.mask_sequence, c.mask_row});
    product(kOut, {mixed, layer.out, layer.out_bias, c.x, c.x, rows, mixed_width, d.hidden, kAsTheyAre});
    rms_norm(thread, c.x, layer.post_norm, normed, rows, d.hidden, (float)d.eps);
    for (const Mlp<T>& mlp : layer.mlps) {
      if (!mlp.gate_up) continue;
      if (c.loras) {  // gates only once they are whole
        T* apart = gated + rows * mlp.width;
        product(kGateUp, {normed, mlp.gate_up, nullptr, nullptr, apart, rows, d.hidden, 2 * mlp.width, kApart});
        swiglu(thread, apart, gated, rows, mlp.width);
      } else {
        linear<T>(thread, {normed, mlp.gate_up, nullptr, nullptr, gated, rows, d.hidden, 2 * mlp.width, kGated});
      }
      product(kDown, {gated, mlp.down, nullptr, c.x, c.x, rows, mlp.width, d.hidden, kAsTheyAre});
    }
    if (c.own) add_own(thread, d, c, normed, gated);
  }
}

// What a call reads and foretells, from token ids to logits.
template <class T>
struct Foretelling {
  const int64_t *tokens, *last;  // [B, T]; [B]: the index in each row behind which is foretold, none: behind every token
  const int64_t* vocabulary;     // [C], token ids of the head's columns; none: all
  const T *norm, *head;          // [H] in front of a target's head; a draft has none
  T *hidden, *logits;            // [R, H] and [R, C], R = B or M
  int64_t* best;                 // [R], the token id of the largest logit
  float* peak;                   // [R], its probability; none: not wanted
  int64_t columns;
};

template <class T>
void find_best(const Foretelling<T>& f, int64_t row) {
  const T* logits = f.logits + row * f.columns;
  Floats highest = Floats{} - INFINITY, total = {};
  for (int64_t c = 0; c < f.columns; c += kLanes) {
    const Floats some = load_some(logits + c, f.columns - c);
    highest = (some > highest) & (kLane + (int)c < (int)f.columns) ? some : highest;
  }
  float most = highest[0];
  for (int lane = 1; lane < kLanes; lane++) most = highest[lane] > most ? highest[lane] : most;
  int64_t column = 0;
  while (column + kLanes < f.columns && !any(load(logits + column) == most)) column += kLanes;
  while (column < f.columns - 1 && (float)logits[column] != most) column++;
  f.best[row] = f.vocabulary ? f.vocabulary[column] : column;
  if (!f.peak) return;
  for (int64_t c = 0; c < f.columns; c += kLanes) {
    const Floats weight = exponential(load_some(logits + c, f.columns - c) - most);
    total += kLane + (int)c < (int)f.columns ? weight : Floats{};
  }
  f.peak[row] = 1 / sum(total);
}

// x = embeddings, of what has no fc to make it.
template <class T>
void embed(Thread& thread, const Decoder<T>& d, const Call<T>& c, const int64_t* tokens) {
  thread.each(c.sequences * c.tokens, [&](int64_t row) {
    std::memcpy(c.x + row * d.hidden, c.embedded + tokens[row] * d.hidden, d.hidden * sizeof(T));
  });
}

template <class T>
void foretell(Thread& thread, const Decoder<T>& d, const Call<T>& c, const Foretelling<T>& f) {
  const int64_t rows = f.last ? c.sequences : c.sequences * c.tokens;
  if (!d.fc) embed(thread, d, c, f.tokens);
  decode(thread, d, c, f.tokens);
  thread.each(rows, [&](int64_t row) {
    const T* x = c.x + (f.last ? row * c.tokens + f.last[row] : row) * d.hidden;
    T* hidden = f.hidden + row * d.hidden;
    if (f.norm)
      norm_of_one(x, f.norm, hidden, d.hidden, (float)d.eps);
    else
      std::memcpy(hidden, x, d.hidden * sizeof(T));
  });
  linear<T>(thread, {f.hidden, f.head, nullptr, nullptr, f.logits, rows, d.hidden, f.columns, kAsTheyAre});
  thread.each(rows, [&](int64_t row) { find_best(f, row); });
}

// When the chains of a batch grow; see farm/decode/growth.py.
struct Growth {
  const double *accepted, *expected;         // [B, bins] and [B, width]; none: they grow to the end
  const double *verify_above, *draft_above;  // [width]
  const int64_t* limits;                     // [B]
  const int64_t *positions, *zeros;          // [length, B] of the drafted tokens; [B]
  int64_t *forwards, *kept;                  // told: how often the draft ran, and how many positions are verified
  int64_t bins, width, length;               // `length` positions at most
};

// A round that follows it. Every thread works it out for itself, from the same numbers.
class Growing {
 public:
  Growing(const Growth& growth, int64_t rows) : g_(growth), survival_(growth.accepted ? rows : 0, 1.) {}

  bool keeps(int64_t index, const float* peak) {
    if (!g_.accepted) return true;
    double sum = 0;
    for (size_t b = 0; b < survival_.size(); b++) {
      const double place = (double)peak[b] * g_.bins;
      const int64_t bin = place > 0 ? std::min((int64_t)place, g_.bins - 1) : 0;  // a NaN is no number to trust
      survival_[b] = index < g_.limits[b] ? survival_[b] * g_.accepted[b * g_.bins + bin] : 0;
      sum += survival_[b];
    }
    return sum > g_.verify_above[index];
  }

  bool grows(int64_t index) const {
    if (!g_.accepted) return true;
    double sum = 0;
    for (size_t b = 0; b < survival_.size(); b++)
      sum += index < g_.limits[b] ? survival_[b] * g_.expected[b * g_.width + index] : 0;
    return sum > g_.draft_above[index];
  }

 private:
  const Growth& g_;
  std::vector<double> survival_;
};

// The most likely chains behind what is pending, a token at a time. Outputs of every step stand behind each other, but
// for the logits, which nobody asks for.
template <class T>
void chain(Thread& thread, const Decoder<T>& d, Call<T> c, Foretelling<T> f, const Growth& g) {
  const int64_t rows = c.sequences;
  Growing growing(g, rows);
  int64_t index = 0, forwards = 1;
  foretell(thread, d, c, f);
  while (growing.keeps(index, f.peak) && ++index < g.length && growing.grows(index)) {
    c.tokens = 1, c.hidden = f.hidden, c.positions = c.offsets = g.positions + (index - 1) * rows;
    f.tokens = f.best, f.last = g.zeros, f.hidden += rows * d.hidden, f.best += rows, f.peak += f.peak ? rows : 0;
    foretell(thread, d, c, f);
    forwards++;
  }
  if (thread.index() == 0) *g.forwards = forwards, *g.kept = index;
}

}  // namespace farm
