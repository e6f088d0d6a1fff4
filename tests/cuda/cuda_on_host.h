// Runs CUDA kernels on the host: g++ -x c++ -include cuda_on_host.h kernels.cu
//
// The blocks of a grid run one after another, and the threads of a block as fibers on one thread of the host: one runs until it
// waits at __syncthreads or in a warp shuffle, then another. In which order they take turns is a setting: whatever the kernels leave
// to chance comes out differently in different orders. A wait that not all threads come to ends the process.
//
// A copy that a thread does not wait for is made at once in forward order, and as late as the thread's waits allow in the others.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
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

// A copy into shared memory on its way, zeros beyond `bytes` of 16, and those of a thread that are.
struct Copy {
  void* to;
  const void* from;
  int bytes;
  void make() const {
    std::memset(to, 0, 16);
    if (bytes > 0) std::memcpy(to, from, bytes);  // nothing is read otherwise
  }
};

struct Copies {
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> next;  // not committed
};

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
  std::vector<std::array<float, 12>> fragments;  // likewise
  std::vector<Copies> copies;
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
  m.fragments.resize(threads);
  m.copies.assign(threads, {});
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

// The instructions of csrc/cuda/tensor_core.cuh.

inline void check_aligned(const void* x) {
  if (reinterpret_cast<uintptr_t>(x) % 16 == 0) return;
  std::fputs("cuda_on_host: an address is not a multiple of 16 bytes\n", stderr);
  std::abort();
}

inline void copy_async(void* to, const void* from, int bytes) {
  check_aligned(to);
  check_aligned(from);
  const Copy copy{to, from, bytes};
  if (order == kForward) {
    copy.make();
  } else {
    machine.copies[machine.current].next.push_back(copy);
  }
}

inline void commit_copies() {
  Copies& mine = machine.copies[machine.current];
  mine.groups.push_back(std::move(mine.next));
  mine.next.clear();
}

template <int kLeft>
void wait_for_copies() {
  Copies& mine = machine.copies[machine.current];
  for (; int(mine.groups.size()) > kLeft; mine.groups.pop_front()) {
    for (const Copy& copy : mine.groups.front()) copy.make();
  }
}

inline void load_matrices(unsigned (&out)[4], const void* row) {
  Machine& m = machine;
  const int self = m.current, first = self / kWarp * kWarp, lane = self % kWarp;
  check_aligned(row);
  m.slots[self] = reinterpret_cast<uintptr_t>(row);
  wait(m.warps[self / kWarp]);
  for (int i = 0; i < 4; ++i) std::memcpy(&out[i], reinterpret_cast<const char*>(m.slots[first + i * 8 + lane / 4]) + lane % 4 * 4, 4);
  wait(m.warps[self / kWarp]);
}

template <typename T>
void multiply_accumulate(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  Machine& m = machine;
  const int self = m.current, first = self / kWarp * kWarp, lane = self % kWarp;
  const unsigned words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  T values[12];
  std::memcpy(values, words, sizeof words);
  for (int i = 0; i < 12; ++i) m.fragments[self][i] = float(values[i]);
  wait(m.warps[self / kWarp]);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {  // who has them: pairs of k in four neighbouring lanes, rows 8 apart in one
      const int part = k % 8 / 2;
      const float x = m.fragments[first + row % 8 * 4 + part][k / 8 * 4 + row / 8 * 2 + k % 2];
      c[i] += x * m.fragments[first + column * 4 + part][8 + k / 8 * 2 + k % 2];
    }
  }
  wait(m.warps[self / kWarp]);
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
