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

size_t rounded_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

/* A stretch of addresses, cut into spans without a gap between them. */
class Stretch {
 public:
  /* Reserve addresses, not memory; false where the process may not have so many. */
  bool reserve(size_t bytes) {
    void* at = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
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
    bytes = rounded_up(bytes, kPage);
    const std::lock_guard<std::mutex> locked(lock_);
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

  /* Give the pages of free spans back to the kernel; their addresses stay. */
  void give_pages_back() {
    const std::lock_guard<std::mutex> locked(lock_);
    for (const auto& [bytes, address] : free_)
      madvise(reinterpret_cast<void*>(address), bytes, MADV_DONTNEED);
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
    const size_t growth = std::min(left, rounded_up(more, kGrowth));
    if (mprotect(reinterpret_cast<void*>(top_), growth, PROT_READ | PROT_WRITE)) return false;
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

void let_go(void* at) {
  if (at == nullptr) return;
  // What torch's own allocator handed out before may come back here: oneDNN's buffers do.
  if (!stretch().holds(at)) return c10::GetDefaultCPUAllocator()->raw_deallocate(at);
  c10::profiledCPUMemoryReporter().Delete(at);
  stretch().give(at);
}

struct StepMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* at = bytes < kLeast ? nullptr : stretch().take(bytes);
    if (at != nullptr)
      c10::profiledCPUMemoryReporter().New(at, bytes);
    else  // it raises where there is no memory
      at = c10::GetDefaultCPUAllocator()->raw_allocate(bytes);
    return {at, at, &let_go, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &let_go; }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

}  // namespace

extern "C" {

/* Serve all CPU tensors to come; once, and for the life of the process. 0 where it can't. */
int step_memory_install(void) {
  const size_t machine = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGE_SIZE);
  if (!stretch().reserve(rounded_up(machine, kGrowth))) return 0;
  // A child that is forked while another thread allocates must find the books in order.
  pthread_atfork([] { stretch().lock(); }, [] { stretch().unlock(); }, [] { stretch().unlock(); });
  c10::SetCPUAllocator(new StepMemory, /*priority=*/1);
  return 1;
}

/* Bytes below which torch's own allocator serves. */
size_t step_memory_least(void) { return kLeast; }

void step_memory_give_back(void) { stretch().give_pages_back(); }

/* Bytes that tensors hold; the most since this was last asked; bytes of addresses ever used. */
size_t step_memory_taken(void) { return stretch().taken(); }
size_t step_memory_peak(void) { return stretch().peak(); }
size_t step_memory_grown(void) { return stretch().grown(); }
}
