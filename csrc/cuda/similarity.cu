// Similarities S = t[ids] t[v0:v1]^T in float32 of half-precision rows, on tensor cores, for as many targets as there are.
//
// A library's product takes a number of rows that the host knows. Here thread blocks read the number of distinct targets on the
// device: those that have no tile leave at once, and rows of t are read where they are, without a gathered copy.
//
//   tile     128 x 128, 8 warps of 64 x 32 each; 64 sums a thread
//   step     32 elements of a row; three steps in shared memory, two of them on their way while one is multiplied
//   order    tiles are numbered column by column in groups of 16 tile rows, so that blocks which run together share rows in L2
#include "tensor_core.cuh"

namespace tiedkl::cuda {
namespace {

constexpr int kTile = 128, kStep = 32, kStages = 3, kGroup = 16;
constexpr int kChunk = 8, kChunks = kStep / kChunk;              // elements of a chunk, chunks of a row
constexpr int kCopies = kTile * kChunks / kThreads;              // chunks that a thread copies of each operand in a step
constexpr int kWarpRows = 64, kWarpColumns = 32;                 // a warp's part of the tile
constexpr int kHigh = kWarpRows / 16, kWide = kWarpColumns / 8;  // its fragments

struct alignas(8) Pair {
  float first, second;
};

// Where a chunk of a row lies, so that the same chunk of eight rows, which are read together, is in different banks. It has
// place(row + 8, chunk) = place(row, chunk) + 8 kChunks and place(row, chunk ^ k) = place(row, chunk) ^ k.
__device__ inline int place(int row, int chunk) { return row * kChunks + (chunk ^ (row / 2 % kChunks)); }

// The first `count` elements of a chunk, at most all, and zeros beyond.
template <bool kWholeChunks>
__device__ inline void fetch(Chunk* to, const uint16_t* from, int count) {
  if constexpr (kWholeChunks) {
    copy_async(to, from, count * int(sizeof *from));
  } else {
    Chunk c;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) c.v[j] = j < count ? from[j] : uint16_t(0);
    *to = c;
  }
}

// kWholeChunks: rows of t start at multiples of 16 bytes
template <typename T, bool kWholeChunks>
__global__ void __launch_bounds__(kThreads, 2) similarity_kernel(Block b, const uint16_t* t, int64_t stride, int width) {
  const int64_t targets = *b.count < b.targets ? *b.count : b.targets;
  const int64_t row_tiles = (targets + kTile - 1) / kTile, column_tiles = (b.cols + kTile - 1) / kTile;
  if (blockIdx.x >= row_tiles * column_tiles) return;
  const int64_t group = blockIdx.x / (kGroup * column_tiles), within = blockIdx.x % (kGroup * column_tiles);
  const int64_t height = row_tiles - group * kGroup < kGroup ? row_tiles - group * kGroup : kGroup;
  const int64_t row0 = (group * kGroup + within % height) * kTile, column0 = within / height * kTile;

  __shared__ Chunk tiles[kStages][2][kTile * kChunks];
  const int thread = threadIdx.x, chunk = thread % kChunks;
  const uint16_t* rows[2][kCopies];  // beyond the last one row 0, whose products nobody stores
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int64_t u = row0 + thread / kChunks + i * (kThreads / kChunks), v = column0 + thread / kChunks + i * (kThreads / kChunks);
    rows[0][i] = t + (u < targets ? b.ids[u] : 0) * stride + chunk * kChunk;
    rows[1][i] = t + (v < b.cols ? b.v0 + v : 0) * stride + chunk * kChunk;
  }
  const auto fetch_step = [&](int stage, int step) {
    const int k = step * kStep, left = width - k - chunk * kChunk;
    const int count = left < 0 ? 0 : left < kChunk ? left : kChunk;
#pragma unroll
    for (int x = 0; x < 2; ++x) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        fetch<kWholeChunks>(&tiles[stage][x][place(thread / kChunks, chunk) + i * kThreads], rows[x][i] + k, count);
      }
    }
  };

  const int lane = thread % kWarp, warp = thread / kWarp;
  const int warp_row = warp % (kTile / kWarpRows) * kWarpRows, warp_column = warp / (kTile / kWarpRows) * kWarpColumns;
  const int left_place = place(warp_row + lane % 16, lane / 16);
  const int right_place = place(warp_column + lane / 16 * 8 + lane % 8, lane / 8 % 2);
  float sums[kHigh][kWide][4] = {};
  const int steps = (width + kStep - 1) / kStep;
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) fetch_step(step, step);
    commit_copies();
  }
  int stage = 0, free = kStages - 1;
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // every thread's copies of this step are there, and the stage of the last one has been read
    if (step + kStages - 1 < steps) fetch_step(free, step + kStages - 1);
    commit_copies();  // an empty one at the end, so that the same number is left each time
#pragma unroll
    for (int k = 0; k < kChunks; k += 2) {
      unsigned left[kHigh][4], right[kWide / 2][4];
#pragma unroll
      for (int i = 0; i < kHigh; ++i) load_matrices(left[i], &tiles[stage][0][(left_place ^ k) + i * 16 * kChunks]);
#pragma unroll
      for (int j = 0; j < kWide / 2; ++j) load_matrices(right[j], &tiles[stage][1][(right_place ^ k) + j * 16 * kChunks]);
#pragma unroll
      for (int i = 0; i < kHigh; ++i) {
#pragma unroll
        for (int j = 0; j < kWide; ++j) multiply_accumulate<T>(sums[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
      }
    }
    free = stage;
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

#pragma unroll
  for (int i = 0; i < 2 * kHigh; ++i) {
    const int64_t u = row0 + warp_row + i * 8 + lane / 4;
    if (u >= targets) continue;
    float* out = b.s + u * b.lds;
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      const int64_t c = column0 + warp_column + j * 8 + lane % 4 * 2;
      const float first = sums[i / 2][j][i % 2 * 2], second = sums[i / 2][j][i % 2 * 2 + 1];
      if (c + 1 < b.cols) {
        *reinterpret_cast<Pair*>(out + c) = {first, second};
      } else if (c < b.cols) {
        out[c] = first;
      }
    }
  }
}

}  // namespace

void similarities(const Block& b, const Matrix& t, void* stream) {
  const uint16_t* data = static_cast<const uint16_t*>(t.data);
  const int width = int(t.columns);
  const bool whole_chunks = reinterpret_cast<uintptr_t>(data) % sizeof(Chunk) == 0 && t.stride_row % kChunk == 0;
  const unsigned tiles = unsigned((b.targets + kTile - 1) / kTile * ((b.cols + kTile - 1) / kTile));
  const auto run = [&](auto value) {
    using T = decltype(value);
    launch(whole_chunks ? similarity_kernel<T, true> : similarity_kernel<T, false>, tiles, stream, b, data, t.stride_row, width);
  };
  if (t.dtype == Dtype::kBFloat16) {
    run(__nv_bfloat16{});
  } else {
    run(__half{});
  }
}

}  // namespace tiedkl::cuda
