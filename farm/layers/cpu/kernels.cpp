// What a decoding step computes on a CPU, for few rows, in float32 and bfloat16: the functions that farm/layers/kernels.py
// calls. It checks shapes; here they are believed.
//
// A row's numbers do not depend on the other rows of a call: a token gets the same logits alone, in a batch and in the
// verification of a drafted chain. (In a tree its context lies elsewhere in the cache and is summed in another order.)

#include "decoder.h"

using namespace farm;

template <class T>
static int64_t work_of(const Decoder<T>& decoder, const Call<T>& call) {
  return call.sequences * call.tokens * decoder.num_layers * decoder.hidden * decoder.hidden;
}

#define FOR(T, name)                                                                                                  \
  extern "C" void linear_##name(const T* x, const T* weights, const T* bias, const T* residual, T* y, int64_t rows,   \
                                int64_t inputs, int64_t outputs, int64_t form, int threads) {                         \
    const Task<T> task = {x, weights, bias, residual, y, rows, inputs, outputs, (Form)form};                          \
    share(threads, rows* inputs* outputs, [&](Thread& thread) { linear(thread, task); });                             \
  }                                                                                                                   \
  extern "C" void rms_norm_##name(const T* x, const T* weight, T* y, int64_t rows, int64_t width, float eps,          \
                                  int threads) {                                                                      \
    share(threads, rows* width, [&](Thread& thread) { rms_norm(thread, x, weight, y, rows, width, eps); });           \
  }                                                                                                                   \
  extern "C" void swiglu_##name(const T* gate_up, T* y, int64_t rows, int64_t width, int threads) {                   \
    share(threads, rows* width, [&](Thread& thread) { swiglu(thread, gate_up, y, rows, width); });                    \
  }                                                                                                                   \
  extern "C" void rotate_##name(T* x, const T* cos, const T* sin, const int64_t* positions, int64_t rows,             \
                                int64_t heads, int64_t rotated, int64_t size, int threads) {                          \
    share(threads, rows* rotated* size, [&](Thread& thread) { rotate(thread, x, cos, sin, positions, rows, heads, rotated, size); });\
  }                                                                                                                   \
  extern "C" void attend_##name(const Attention<T>* a, int threads) {                                                 \
    const int64_t queries = a->sequences * a->kv_heads * a->group * a->tokens;                                        \
    share(threads, queries* a->context* a->size, [&](Thread& thread) { attend(thread, *a); });                        \
  }                                                                                                                   \
  extern "C" void decode_##name(const Decoder<T>* decoder, const Call<T>* call, int threads) {                        \
    share(threads, work_of(*decoder, *call), [&](Thread& thread) { decode(thread, *decoder, *call); });               \
  }                                                                                                                   \
  extern "C" void foretell_##name(const Decoder<T>* decoder, const Call<T>* call, const Foretelling<T>* foretelling,  \
                                  int threads) {                                                                      \
    share(threads, work_of(*decoder, *call), [&](Thread& thread) { foretell(thread, *decoder, *call, *foretelling); });\
  }                                                                                                                   \
  extern "C" void chain_##name(const Decoder<T>* decoder, const Call<T>* call, const Foretelling<T>* foretelling,     \
                               const Growth* growth, int threads) {                                                   \
    share(threads, work_of(*decoder, *call), [&](Thread& thread) { chain(thread, *decoder, *call, *foretelling, *growth); });\
  }

FOR(float, float32)
FOR(bfloat16, bfloat16)

extern "C" int64_t lanes() { return kLanes; }

extern "C" void keep_bytes(const char* kv, int64_t row_bytes, const int64_t* entries, char* cache, int64_t rows,
                           int64_t heads, int64_t bytes, int threads) {
  share(threads, rows * heads * bytes, [&](Thread& thread) { keep(thread, kv, row_bytes, entries, cache, rows, heads, bytes); });
}
