// Runs CUDA kernels on the host: g++ -x c++ -include cuda_on_host.h kernels.cu
//
// The blocks of a grid run one after another, and the threads of a block as fibers on one thread of the host: one runs until it
// waits at __syncthreads or in a warp shuffle, then another. In which order they take turns is a setting: whatever the kernels leave
// to chance comes out differently in different orders. A wait that not all threads come to ends the process.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(n)
#define __shared__ static  // blocks run one after another, on one thread

using __nv_bfloat16 = c10::BFloat16;
using __half = c10::Half;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx;

namespace cuda_on_host {

constexpr int kWarp = 32;
constexpr size_t kStack = (64 << 10) + 4416;  // not a power of two, or all stacks would share a few cache lines

enum Order { kForward, kBackward, kShuffled };
inline Order order = kForward;

// Threads that wait for one another: a block, or a warp of it.
struct Barrier {
  int size = 0, arrived = 0, turn = 0;
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf state;
  bool started = false, done = false;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<int> places;  // in what order fibers take turns
  std::vector<Barrier> warps;
  Barrier block;
  std::vector<uint64_t> slots;  // what a thread offers to its warp
  const std::function<void()>* body = nullptr;
  int current = 0, place = 0, live = 0, idle = 0;
  jmp_buf finished;
  std::mt19937 random{1};
};

inline Machine machine;

inline void run_fiber();

inline void enter(int place) {
  Machine& m = machine;
  m.place = place;
  m.current = m.places[place];
  threadIdx.x = m.current;
  Fiber& f = m.fibers[m.current];
  if (f.started) _longjmp(f.state, 1);
  f.started = true;
  getcontext(&f.start);
  f.start.uc_stack.ss_sp = f.stack.get();
  f.start.uc_stack.ss_size = kStack;
  f.start.uc_link = nullptr;
  makecontext(&f.start, run_fiber, 0);
  setcontext(&f.start);
}

// Hands over to the next fiber that has not ended.
inline void hand_over() {
  Machine& m = machine;
  const int n = m.fibers.size();
  if (m.live == 0) _longjmp(m.finished, 1);
  if (++m.idle > 4 * n) {
    std::fputs("cuda_on_host: some threads of a block wait where the others never come\n", stderr);
    std::abort();
  }
  int place = m.place;
  do place = (place + 1) % n;
  while (m.fibers[m.places[place]].done);
  enter(place);
}

inline void wait(Barrier& b) {
  Machine& m = machine;
  const int turn = b.turn, self = m.current;
  if (++b.arrived == b.size) {
    b.arrived = 0, ++b.turn, m.idle = 0;
    return;
  }
  while (b.turn == turn) {
    if (_setjmp(m.fibers[self].state) == 0) hand_over();
  }
}

inline void run_fiber() {
  Machine& m = machine;
  for (;;) {  // a turn for each block
    (*m.body)();
    Fiber& self = m.fibers[m.current];
    self.done = true;
    --m.live, m.idle = 0;
    if (_setjmp(self.state) == 0) hand_over();
  }
}

inline void run_block(int threads) {
  Machine& m = machine;
  m.live = threads, m.idle = 0;
  m.block = {threads, 0, 0};
  m.warps.assign((threads + kWarp - 1) / kWarp, Barrier{kWarp, 0, 0});
  m.slots.assign(threads, 0);
  m.places.resize(threads);
  for (int i = 0; i < threads; ++i) m.places[i] = order == kBackward ? threads - 1 - i : i;
  if (order == kShuffled) std::shuffle(m.places.begin(), m.places.end(), m.random);
  for (Fiber& f : m.fibers) f.done = false;
  if (_setjmp(m.finished) == 0) enter(0);
}

inline void run(dim3 grid, int threads, const std::function<void()>& body) {
  Machine& m = machine;
  if (int(m.fibers.size()) != threads) m.fibers = std::vector<Fiber>(threads);
  m.body = &body;
  for (unsigned i = 0; i < grid.x * grid.y; ++i) {
    blockIdx = dim3(i % grid.x, i / grid.x);
    run_block(threads);
  }
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::machine.block); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  auto& m = cuda_on_host::machine;
  const int self = m.current, warp = self / cuda_on_host::kWarp;
  static_assert(sizeof(T) <= sizeof(uint64_t));
  std::memcpy(&m.slots[self], &value, sizeof value);
  cuda_on_host::wait(m.warps[warp]);
  T other;
  std::memcpy(&other, &m.slots[self ^ lanes], sizeof other);
  cuda_on_host::wait(m.warps[warp]);  // all have read before anyone offers anew
  return other;
}
