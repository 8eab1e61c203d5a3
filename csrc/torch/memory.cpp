#include "memory.h"

#include <pthread.h>

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace pyflow {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kMostPieces = 64;  // of memory that is not in use

// in front of the memory
struct alignas(kAlignment) Header {
  size_t bytes;
};

// memory that is not in use, the last returned at the end
struct Unused {
  std::mutex lock;
  std::vector<Header*> list;
  size_t bytes = 0;
};

Unused& unused();

// a child process has a copy that nobody holds
Unused* new_unused() {
  const auto unlock = [] { unused().lock.unlock(); };
  pthread_atfork([] { unused().lock.lock(); }, unlock, unlock);
  return new Unused;
}

// never destroyed: tensors may return memory after everything else is
Unused& unused() {
  static Unused& all = *new_unused();
  return all;
}

// the smallest that fits, if it is not more than twice as large
Header* find(Unused& all, size_t bytes) {
  size_t best = all.list.size();
  for (size_t i = 0; i < all.list.size(); ++i) {
    const size_t size = all.list[i]->bytes;
    if (size >= bytes && size / 2 <= bytes && (best == all.list.size() || size < all.list[best]->bytes)) best = i;
  }
  if (best == all.list.size()) return nullptr;
  Header* found = all.list[best];
  all.list.erase(all.list.begin() + std::ptrdiff_t(best));
  all.bytes -= found->bytes;
  return found;
}

}  // namespace

char* take_memory(int64_t bytes) {
  const size_t size = size_t(round_up(bytes, int64_t(kAlignment)));
  {
    Unused& all = unused();
    const std::lock_guard<std::mutex> guard(all.lock);
    if (Header* found = find(all, size)) return (char*)(found + 1);
  }
  Header* made = (Header*)std::aligned_alloc(kAlignment, sizeof(Header) + size);
  if (!made) throw std::bad_alloc();
  made->bytes = size;
  return (char*)(made + 1);
}

void give_memory(void* memory) {
  Header* header = (Header*)memory - 1;
  std::vector<Header*> old;
  {
    Unused& all = unused();
    const std::lock_guard<std::mutex> guard(all.lock);
    all.list.push_back(header);
    all.bytes += header->bytes;
    while (all.bytes > size_t(kMostUnused) || all.list.size() > kMostPieces) {
      old.push_back(all.list.front());
      all.bytes -= all.list.front()->bytes;
      all.list.erase(all.list.begin());
    }
  }
  for (Header* each : old) std::free(each);
}

Tensor new_reused(const Tensor& like, int64_t rows, int64_t columns, bool f64) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  if (rows == 0 || columns == 0) return new_empty(like, sizes, 2, compute_type(f64));
  STD_TORCH_CHECK(rows <= (int64_t(1) << 50) / columns, "pyflow: too large");
  char* memory = take_memory(rows * columns * (f64 ? 8 : 4));
  return torch::stable::from_blob(memory, {sizes, 2}, {strides, 2}, like.device(), compute_type(f64), &give_memory);
}

}  // namespace pyflow
