// The fibers of a block. PYFLOW_EMULATED_ORDER is the order of threads and of blocks: "forward" (the default),
// "backward", or a number, the seed of a random order of blocks, of a block's warps and of a warp's lanes.
#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulated {
namespace {

constexpr size_t kStack = 256 << 10;

struct Fiber {
  jmp_buf context;
  std::unique_ptr<char[]> stack;
  bool started = false, waits = false, done = false;
  Site at{};
};

// threads that wait for each other
struct Meeting {
  unsigned arrived = 0;
  Site at{};
};

struct Warp {
  Meeting meeting;
  uint64_t words[2][kWarp];  // by turns, since a lane may be one collective ahead of another
  unsigned turn = 0;
};

std::mutex one_launch;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
Meeting barrier;
const std::function<void()>* body;
jmp_buf scheduler;
unsigned now;
std::string fault_of_launch;
std::string last_error, reported;

// the only thread-local variable that is not __shared__; it finds the others
thread_local char among_shared;

struct Bytes {
  char* begin;
  size_t count;
};

// the __shared__ variables of this module, in this thread
Bytes shared_memory() {
  Bytes found{&among_shared, sizeof among_shared};
  const auto visit = [](dl_phdr_info* module, size_t, void* result) {
    Bytes& bytes = *(Bytes*)result;
    char* begin = (char*)module->dlpi_tls_data;
    for (int i = 0; i < module->dlpi_phnum; ++i) {
      const auto& part = module->dlpi_phdr[i];
      if (part.p_type != PT_TLS || bytes.begin < begin || bytes.begin >= begin + part.p_memsz) continue;
      bytes = {begin, part.p_memsz};
      return 1;
    }
    return 0;
  };
  dl_iterate_phdr(visit, &found);
  return found;
}

std::string text(const Site& s) {
  const char* name = std::strrchr(s.file, '/');
  return std::string(s.what) + " at " + (name ? name + 1 : s.file) + ":" + std::to_string(s.line);
}

bool same(const Site& a, const Site& b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

[[noreturn]] void to_scheduler() { _longjmp(scheduler, 1); }

// ends the launch; the fibers are left where they are
[[noreturn]] void fault(const std::string& what) {
  fault_of_launch = "block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(now) + ": " + what;
  to_scheduler();
}

void pause() {
  if (_setjmp(fibers[now].context) == 0) to_scheduler();
}

// a fiber is made once and runs its thread in block after block
void entry() {
  for (;;) {
    (*body)();
    fibers[now].done = true;
    pause();
  }
}

void resume(unsigned thread) {
  now = thread;
  threadIdx.x = thread;
  Fiber& f = fibers[thread];
  if (_setjmp(scheduler) != 0) return;
  if (f.started) _longjmp(f.context, 1);
  f.started = true;
  ucontext_t context;
  getcontext(&context);
  if (!f.stack) f.stack.reset(new char[kStack]);
  context.uc_stack.ss_sp = f.stack.get();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
  setcontext(&context);
}

// waits until `count` threads, of numbers first to first + count - 1, have come
void meet(Meeting& m, const Site& at, unsigned first, unsigned count) {
  if (m.arrived > 0 && !same(m.at, at)) fault(text(at) + ", but others wait in " + text(m.at));
  m.at = at;
  if (++m.arrived < count) {
    fibers[now].waits = true;
    fibers[now].at = at;
    return pause();
  }
  m.arrived = 0;
  for (unsigned t = first; t < first + count; ++t) fibers[t].waits = false;
}

// what the threads of a block do when none can go on
std::string positions() {
  std::map<std::string, int> waiting;
  int returned = 0;
  for (const Fiber& f : fibers) f.done ? ++returned : ++waiting[text(f.at)];
  std::string all;
  for (const auto& [where, threads] : waiting) all += std::to_string(threads) + " threads wait in " + where + ", ";
  return all + std::to_string(returned) + " have returned";
}

class Order {
 public:
  Order() {
    const char* name = std::getenv("PYFLOW_EMULATED_ORDER");
    const std::string order = name ? name : "forward";
    backward_ = order == "backward";
    random_ = !backward_ && order != "forward";
    if (random_) generator_.seed(unsigned(std::strtoul(name, nullptr, 10)));
  }

  std::vector<unsigned> blocks(unsigned count) { return numbers(count); }

  void start_block() {
    threads_.clear();
    for (unsigned warp : numbers(unsigned(warps.size()))) {
      for (unsigned lane : numbers(kWarp)) {
        if (warp * kWarp + lane < fibers.size()) threads_.push_back(warp * kWarp + lane);
      }
    }
  }

  // The first thread of the order that can go on, or null. A warp thus gets as far ahead of the others as it can.
  const unsigned* thread() const {
    for (const unsigned& t : threads_) {
      if (!fibers[t].waits && !fibers[t].done) return &t;
    }
    return nullptr;
  }

 private:
  std::vector<unsigned> numbers(unsigned count) {
    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0);
    if (backward_) std::reverse(order.begin(), order.end());
    if (random_) std::shuffle(order.begin(), order.end(), generator_);
    return order;
  }

  std::vector<unsigned> threads_;
  bool backward_, random_;
  std::mt19937 generator_;
};

void run_block(Order& order, const Bytes& shared) {
  std::memset(shared.begin, 0xff, shared.count);
  barrier = {};
  for (Warp& w : warps) w.meeting = {};
  for (Fiber& f : fibers) f.waits = f.done = false;
  order.start_block();
  while (const unsigned* t = order.thread()) {
    resume(*t);
    if (!fault_of_launch.empty()) return;
  }
  if (std::any_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return !f.done; })) {
    fault_of_launch = "block " + std::to_string(blockIdx.x) + ": deadlock: " + positions();
  }
}

}  // namespace

void run(unsigned blocks, unsigned threads, const std::function<void()>& run_thread) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (fibers.size() != threads) fibers = std::vector<Fiber>(threads);
  warps.resize((threads + kWarp - 1) / kWarp);
  body = &run_thread;
  gridDim = {blocks, 1, 1};
  blockDim = {threads, 1, 1};
  const Bytes shared = shared_memory();
  Order order;
  for (unsigned block : order.blocks(blocks)) {
    blockIdx = {block, 0, 0};
    run_block(order, shared);
    if (fault_of_launch.empty()) continue;
    if (last_error.empty()) last_error = fault_of_launch;
    fault_of_launch.clear();
    for (Fiber& f : fibers) f.started = false;
    return;
  }
}

void block_barrier(Site at) { meet(barrier, at, 0, unsigned(fibers.size())); }

const uint64_t* exchange(Site at, unsigned mask, uint64_t word) {
  if (mask != 0xffffffffu) fault(text(at) + ": the mask must name all 32 lanes");
  Warp& w = warps[now / kWarp];
  const uint64_t* words = w.words[w.turn % 2];
  w.words[w.turn % 2][now % kWarp] = word;
  if (w.meeting.arrived + 1 == kWarp) ++w.turn;
  meet(w.meeting, at, now / kWarp * kWarp, kWarp);
  return words;
}

}  // namespace emulated

cudaError_t cudaGetLastError() {
  emulated::reported.clear();
  emulated::reported.swap(emulated::last_error);
  return emulated::reported.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

const char* cudaGetErrorString(cudaError_t) { return emulated::reported.c_str(); }
