/* An allocator for torch's tensors on a CPU that keeps what a training step frees for the next one.
 *
 * A step frees some hundred megabytes, in pieces of ever other sizes, and asks for as much again.
 * Here they lie side by side in one stretch of addresses: what is freed grows together with free
 * neighbours at once, the smallest piece that fits is cut, and nothing goes back to the kernel
 * before somebody says so. Small tensors stay with torch's own allocator.
 */
#include <c10/core/CPUAllocator.h>

#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <set>
#include <utility>

namespace {

using Address = uintptr_t;

constexpr size_t kPage = 4096;
constexpr size_t kLeast = 16 << 10;   // bytes; smaller ones are no burden for malloc
constexpr size_t kGrowth = 64 << 20;  // made writable at a time, in large pages where there are any
constexpr int kReserved = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;  // addresses, no memory

size_t rounded_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

/* A stretch of addresses, cut into spans without a gap between them. */
class Stretch {
 public:
  /* Reserve addresses, not memory; false where the process may not have so many. */
  bool reserve(size_t bytes) {
    void* at = mmap(nullptr, bytes, PROT_NONE, kReserved, -1, 0);
    if (at == MAP_FAILED) return false;
    madvise(at, bytes, MADV_HUGEPAGE);  // a wish: where it isn't granted, pages are small
    start_ = top_ = reinterpret_cast<Address>(at);
    end_ = start_ + bytes;
    return true;
  }

  bool holds(const void* at) const {
    const Address address = reinterpret_cast<Address>(at);
    return address >= start_ && address < end_;
  }

  /* Hand out memory; nullptr where there is none. */
  void* take(size_t bytes) noexcept {
    const std::lock_guard<std::mutex> locked(lock_);
    if (bytes > end_ - start_) return nullptr;  // before rounding: a negative size would wrap to 0
    bytes = rounded_up(bytes, kPage);
    try {
      auto fit = free_.lower_bound({bytes, 0});
      if (fit == free_.end()) {
        if (!grow(bytes)) return nullptr;
        fit = free_.lower_bound({bytes, 0});
      }
      const auto span = spans_.find(fit->second);
      if (span->second.bytes > bytes) cut(span, bytes);
      span->second.node = free_.extract(fit);
      taken_ += span->second.bytes;
      peak_ = std::max(peak_, taken_);
      return reinterpret_cast<void*>(span->first);
    } catch (const std::bad_alloc&) {  // no room for the books
      return nullptr;
    }
  }

  /* Take back what was handed out. Needs no memory, so it can't fail. */
  void give(void* at) noexcept {
    const std::lock_guard<std::mutex> locked(lock_);
    auto span = spans_.find(reinterpret_cast<Address>(at));
    taken_ -= span->second.bytes;
    Free::node_type node = std::move(span->second.node);
    const auto next = std::next(span);
    if (next != spans_.end() && next->second.free()) {
      free_.erase({next->second.bytes, next->first});
      span->second.bytes += next->second.bytes;
      spans_.erase(next);
    }
    if (span != spans_.begin()) {
      const auto previous = std::prev(span);
      if (previous->second.free()) {
        free_.erase({previous->second.bytes, previous->first});
        previous->second.bytes += span->second.bytes;
        spans_.erase(span);
        span = previous;
      }
    }
    node.value() = {span->second.bytes, span->first};
    free_.insert(std::move(node));
  }

  /* Give the pages of free spans back to the kernel; their addresses stay. Those at the end
   * are as if they had never been used, so a limit of writable memory (RLIMIT_DATA) forgets them. */
  void give_pages_back() {
    const std::lock_guard<std::mutex> locked(lock_);
    for (const auto& [bytes, address] : free_)
      madvise(reinterpret_cast<void*>(address), bytes, MADV_DONTNEED);
    if (spans_.empty()) return;
    const auto last = std::prev(spans_.end());
    const size_t bytes = last->second.bytes;
    if (!last->second.free() || mprotect(reinterpret_cast<void*>(last->first), bytes, PROT_NONE))
      return;
    top_ = last->first;
    free_.erase({bytes, last->first});
    spans_.erase(last);
  }

  size_t taken() {
    const std::lock_guard<std::mutex> locked(lock_);
    return taken_;
  }

  /* The most ever taken at once since this was last asked. */
  size_t peak() {
    const std::lock_guard<std::mutex> locked(lock_);
    return std::exchange(peak_, taken_);
  }

  size_t grown() {
    const std::lock_guard<std::mutex> locked(lock_);
    return top_ - start_;
  }

  void lock() { lock_.lock(); }
  void unlock() { lock_.unlock(); }

 private:
  using Free = std::set<std::pair<size_t, Address>>;  // bytes first: the smallest that fits

  struct Span {
    size_t bytes;
    Free::node_type node{};  // its place among the free ones, kept while it is taken
    bool free() const { return node.empty(); }
  };
  using Spans = std::map<Address, Span>;

  bool made_writable(size_t bytes) const {
    return mprotect(reinterpret_cast<void*>(top_), bytes, PROT_READ | PROT_WRITE) == 0;
  }

  /* Make what is left of a free span one of its own. The span must still be among the free. */
  void cut(Spans::iterator span, size_t bytes) {
    const Address address = span->first + bytes;
    const size_t left = span->second.bytes - bytes;
    const auto rest = spans_.emplace_hint(std::next(span), address, Span{left});
    try {
      free_.emplace(left, address);
    } catch (...) {
      spans_.erase(rest);
      throw;
    }
    span->second.bytes = bytes;
  }

  /* Lengthen the last free span, or add one, until so many bytes fit. */
  bool grow(size_t bytes) {
    const auto last = spans_.empty() ? spans_.end() : std::prev(spans_.end());
    const bool joins = last != spans_.end() && last->second.free();
    const size_t more = bytes - (joins ? last->second.bytes : 0);
    const size_t left = end_ - top_;
    if (more > left) return false;
    size_t growth = std::min(left, rounded_up(more, kGrowth));
    if (!made_writable(growth)) {
      growth = more;  // a limit may leave room for just that
      if (!made_writable(growth)) return false;
    }
    if (joins) {
      auto node = free_.extract({last->second.bytes, last->first});
      last->second.bytes += growth;
      node.value().first += growth;
      free_.insert(std::move(node));
    } else {
      const auto added = spans_.emplace_hint(spans_.end(), top_, Span{growth});
      try {
        free_.emplace(growth, top_);
      } catch (...) {
        spans_.erase(added);
        throw;
      }
    }
    top_ += growth;
    return true;
  }

  std::mutex lock_;
  Address start_ = 0, top_ = 0, end_ = 0;
  Spans spans_;
  Free free_;
  size_t taken_ = 0, peak_ = 0;
};

/* Never destroyed: tensors may outlive whatever the process takes down at its end. */
Stretch& stretch() {
  static Stretch* const only = new Stretch;
  return *only;
}

/* The allocator that was there before: it serves small tensors, and what finds no room here. */
c10::Allocator* before_us = nullptr;

void let_go(void* at) {
  if (at == nullptr) return;
  // What it handed out before may come back here as well: oneDNN's buffers do.
  if (!stretch().holds(at)) return before_us->raw_deallocate(at);
  c10::profiledCPUMemoryReporter().Delete(at);
  stretch().give(at);
}

struct StepMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* at = bytes < kLeast ? nullptr : stretch().take(bytes);
    if (at != nullptr)
      c10::profiledCPUMemoryReporter().New(at, bytes);
    else  // it raises where there is no memory
      at = before_us->raw_allocate(bytes);
    return {at, at, &let_go, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &let_go; }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

}  // namespace

extern "C" {

/* What installing came to. */
enum { kInstalled = 0, kNoAddresses = 1, kRefused = 2 };

/* Serve all CPU tensors to come, for the life of the process. However often and by however many
 * threads it is called, it is done once. */
int step_memory_install(void) {
  static const int done = [] {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGE_SIZE));
    const size_t machine = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * page;
    rlimit addresses;
    // Where addresses are counted, the rest of the process needs as many.
    if (getrlimit(RLIMIT_AS, &addresses) || (addresses.rlim_cur != RLIM_INFINITY &&
                                             addresses.rlim_cur / 2 < machine))
      return static_cast<int>(kNoAddresses);
    before_us = c10::GetCPUAllocator();
    if (before_us->raw_deleter() == nullptr) return static_cast<int>(kRefused);
    if (!stretch().reserve(rounded_up(machine, kGrowth))) return static_cast<int>(kNoAddresses);
    // A child that is forked while another thread allocates must find the books in order.
    if (pthread_atfork([] { stretch().lock(); }, [] { stretch().unlock(); },
                       [] { stretch().unlock(); }))
      return static_cast<int>(kRefused);
    static StepMemory* const ours = new StepMemory;
    c10::SetCPUAllocator(ours, /*priority=*/1);
    return static_cast<int>(c10::GetCPUAllocator() == ours ? kInstalled : kRefused);
  }();
  return done;
}

/* Bytes below which the allocator from before serves. */
size_t step_memory_least(void) { return kLeast; }

void step_memory_give_back(void) { stretch().give_pages_back(); }

/* Bytes that tensors hold; the most since this was last asked; bytes in use or kept for use. */
size_t step_memory_taken(void) { return stretch().taken(); }
size_t step_memory_peak(void) { return stretch().peak(); }
size_t step_memory_grown(void) { return stretch().grown(); }
}
