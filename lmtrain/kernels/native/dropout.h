// Dropout without a mask in memory: whether an element is kept depends on a hash of a seed and its
// index in the mask, which the backward computes again.

typedef uint32_t uvec __attribute__((vector_size(4 * VL)));

// A bijection of 32 bits that mixes them well: `lowbias32` of Wellons' Hash Prospector.
static inline uvec mix(uvec x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// The elements of thread `id`.
template <class Num> static void dropout(const DropoutArguments& a, int id, int threads) {
  const uint32_t low = (uint32_t)a.seed, high = (uint32_t)((uint64_t)a.seed >> 32);
  const uint32_t dropped = (uint32_t)a.dropped;
  uvec lane;
  for (int i = 0; i < VL; ++i) lane[i] = low + i;
  const int64_t end = a.size * (id + 1) / threads;
  for (int64_t first = a.size * id / threads; first < end;) {
    const int64_t index = first % a.mask_size;
    const int64_t count = std::min(end - first, a.mask_size - index);
    const Num* inputs = (const Num*)a.inputs + first;
    Num* outputs = (Num*)a.outputs + first;
    for (int64_t i = 0; i < count; i += VL) {
      int n = (int)std::min<int64_t>(VL, count - i);
      uvec hash = mix(mix(lane + (uint32_t)(index + i)) + high);
      ivec kept = (ivec)(hash >= dropped);
      store(outputs + i, (vec)((ivec)(load(inputs + i, n) * a.factor) & kept), n);
    }
    first += count;
  }
}
