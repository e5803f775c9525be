// What lies between products and attention: norms, the gate, rotary positions, keys and values into the cache.
#pragma once

#include "threads.h"
#include "vectors.h"

namespace farm {

template <class T>
inline void norm_of_one(const T* x, const T* weight, T* y, int64_t width, float eps) {
  Floats squares = {};
  for (int64_t h = 0; h < width; h += kLanes) {
    const Floats value = load_some(x + h, width - h);
    squares += value * value;
  }
  const float scale = 1 / std::sqrt(sum(squares) / width + eps);
  for (int64_t h = 0; h < width; h += kLanes) {
    const Floats value = load_some(x + h, width - h) * scale;
    store_some(y + h, value * load_some(weight + h, width - h), width - h);
  }
}

template <class T>
void rms_norm(Thread& thread, const T* x, const T* weight, T* y, int64_t rows, int64_t width, float eps) {
  thread.each(rows, [&](int64_t row) { norm_of_one(x + row * width, weight, y + row * width, width, eps); });
}

template <class T>
void swiglu(Thread& thread, const T* gate_up, T* y, int64_t rows, int64_t width) {
  thread.each(rows, [&](int64_t row) {
    for (int64_t f = 0; f < width; f += kLanes) {
      const T *gate = gate_up + row * 2 * width + f, *up = gate + width;
      const Floats value = silu(load_some(gate, width - f)) * load_some(up, width - f);
      store_some(y + row * width + f, value, width - f);
    }
  });
}

// Turns `heads` heads of one token in place; sin is negated in its first half.
template <class T>
inline void turn(T* x, const T* cos, const T* sin, int64_t heads, int64_t size) {
  const int64_t half = size / 2;
  for (int64_t head = 0; head < heads; head++) {
    T *first = x + head * size, *second = first + half;
    for (int64_t d = 0; d < half; d += kLanes) {
      const int64_t count = half - d;
      const Floats a = load_some(first + d, count), b = load_some(second + d, count);
      store_some(first + d, a * load_some(cos + d, count) + b * load_some(sin + d, count), count);
      store_some(second + d, b * load_some(cos + half + d, count) + a * load_some(sin + half + d, count), count);
    }
  }
}

// Of each row the first `rotated` heads, by its position's line of the tables.
template <class T>
void rotate(Thread& thread, T* x, const T* cos, const T* sin, const int64_t* positions, int64_t rows, int64_t heads,
            int64_t rotated, int64_t size) {
  thread.each(rows, [&](int64_t row) {
    turn(x + row * heads * size, cos + positions[row] * size, sin + positions[row] * size, rotated, size);
  });
}

// Keys and values of each row into the cache: `heads` vectors of `bytes` a row, to the entries named.
inline void keep(Thread& thread, const char* kv, int64_t row_bytes, const int64_t* entries, char* cache, int64_t rows,
                 int64_t heads, int64_t bytes) {
  thread.each(rows, [&](int64_t row) {
    for (int64_t head = 0; head < heads; head++)
      std::memcpy(cache + entries[row * heads + head] * bytes, kv + row * row_bytes + head * bytes, bytes);
  });
}

}  // namespace farm
