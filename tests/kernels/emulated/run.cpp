// `attend`, then `combine`, of `latent_row.cu` on a CPU. The tensors that kernels in front write come late.
#include "latent_row.cu"

static Parameters given;

extern "C" void latent_row(const Parameters* p, const void* from, void* to, size_t bytes) {
  given = *p;
  memset(stages, 0xff, sizeof stages);   // no numbers
  late_from = (const u8*)from, late_to = (u8*)to, late_bytes = bytes;
  run_blocks(given.chunks, 288, [] { attend(given); });
  run_blocks(HEADS * (RANK / SLICE), 256, [] { combine(given); });
}
