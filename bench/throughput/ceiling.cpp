// The ceiling of a CPU step: its arrays read and written by as many threads in the same chunks,
// with next to no arithmetic. Compiled by ceiling.py.
#include <cstdint>

namespace {

// array[0] is the parameter, array[1] the gradient (read only), the rest are states.
template <int kArrays>
void stream_chunk(float* const* array, int64_t begin, int64_t end) {
  const float* const g = array[1];
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    array[0][i] = g[i] - array[0][i];
    for (int a = 2; a < kArrays; ++a) array[a][i] = g[i] - array[a][i];
  }
}

}  // namespace

extern "C" void stream(float* const* arrays, int64_t per_tensor, const int64_t* chunk_tensor,
                       const int64_t* chunk_begin, const int64_t* chunk_end, int64_t chunks,
                       int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t c = 0; c < chunks; ++c) {
    float* const* const array = arrays + chunk_tensor[c] * per_tensor;
    switch (per_tensor) {
      case 2: stream_chunk<2>(array, chunk_begin[c], chunk_end[c]); break;
      case 3: stream_chunk<3>(array, chunk_begin[c], chunk_end[c]); break;
      case 4: stream_chunk<4>(array, chunk_begin[c], chunk_end[c]); break;
    }
  }
}
