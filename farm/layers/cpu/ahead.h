// Memory that is needed soon, asked for between other work: what a mixture's rows have of their own is read in short
// runs, each of which would begin with a wait.
#pragma once

#include <cstdint>
#include <vector>

namespace farm {

constexpr int64_t kLine = 64;  // bytes that come at once

// Stretches of memory, asked for a few lines at a time.
class Ahead {
 public:
  void clear() { stretches_.clear(), next_ = lines_ = 0, at_ = end_ = nullptr; }

  void add(const void* first, int64_t bytes) {
    if (bytes <= 0) return;
    stretches_.push_back({(const char*)first, bytes});
    lines_ += (bytes + kLine - 1) / kLine;
  }

  // Shared out over that many calls of `fetch`.
  void spread(int64_t calls) { share_ = calls > 0 ? (lines_ + calls - 1) / calls : 0; }

  void fetch() {
    for (int64_t i = 0; i < share_; i++, at_ += kLine) {
      if (at_ >= end_) {
        if (next_ == stretches_.size()) return void(share_ = 0);
        at_ = stretches_[next_].first, end_ = at_ + stretches_[next_].bytes, next_++;
      }
      __builtin_prefetch(at_, 0, 2);  // for a larger cache than the first: that one has the weights
    }
  }

 private:
  struct Stretch {
    const char* first;
    int64_t bytes;
  };
  std::vector<Stretch> stretches_;
  size_t next_ = 0;
  int64_t lines_ = 0, share_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;
};

}  // namespace farm
