// bf16 matrix products on CPUs without instructions for them: multiplied in fp32, rounded once. See bf16_products.py.
// Suffix legend: M rows, K summed, N columns, B batches.

#include <ATen/ATen.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward_cpu_dispatch.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/baddbmm_cpu_dispatch.h>
#include <ATen/ops/bmm_cpu_dispatch.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

namespace {

using at::Scalar;
using at::Tensor;

// Elements of a factor that exist in fp32 at one time. The right one's are small enough to stay in cache.
constexpr int64_t LEFT = 1 << 21, RIGHT = 1 << 18, TALLEST = 2048, NARROWEST = 64;
// So few rows times a transposed matrix are dot products, for which torch's own kernel need not copy the matrix.
constexpr int64_t DOTS = 2;

bool is_bf16(const Tensor& tensor) { return tensor.scalar_type() == at::kBFloat16; }

// Whether the product is made here. What does not fit together is left to torch, which says so.
bool is_ours(const Tensor& left, const Tensor& right, int64_t rank) {
  if (!is_bf16(left) || !is_bf16(right) || left.dim() != rank || right.dim() != rank) return false;
  if (left.size(-1) != right.size(-2) || (rank == 3 && left.size(0) != right.size(0))) return false;
  return left.size(-2) > DOTS || right.stride(-2) != 1;
}

std::vector<int64_t> shape_of(const Tensor& left, const Tensor& right) {
  auto shape = left.sizes().vec();
  shape.back() = right.size(-1);
  return shape;
}

// Memory of one thread that is used again by every product: fresh pages cost as much as what is written to them.
struct Scratch {
  Tensor memory;

  Tensor view(int64_t rows, int64_t columns, bool flipped = false) {
    if (!memory.defined() || memory.numel() < rows * columns) memory = at::empty({rows * columns}, at::kFloat);
    return flipped ? memory.as_strided({rows, columns}, {1, rows}) : memory.as_strided({rows, columns}, {columns, 1});
  }

  Tensor exact(const Tensor& part) {
    return view(part.size(0), part.size(1), part.stride(0) < part.stride(1)).copy_(part);
  }
};
thread_local Scratch of_left, of_right, of_product;

// out_MN = beta * added_MN + alpha * left_MK @ right_KN, without added where it is undefined. `out` may be `added`.
void multiply(const Tensor& out, const Tensor& added, const Tensor& left, const Tensor& right, const Scalar& beta,
              const Scalar& alpha) {
  const int64_t M = left.size(0), K = std::max<int64_t>(left.size(1), 1), N = right.size(1);
  const int64_t tall = std::clamp<int64_t>(LEFT / K, 1, TALLEST), wide = std::max<int64_t>(RIGHT / K, NARROWEST);
  for (int64_t row = 0; row < M; row += tall) {
    const int64_t rows = std::min(tall, M - row);
    const Tensor exact_left = of_left.exact(left.narrow(0, row, rows));
    for (int64_t column = 0; column < N; column += wide) {
      const int64_t columns = std::min(wide, N - column);
      const auto part = [&](const Tensor& whole) { return whole.narrow(0, row, rows).narrow(1, column, columns); };
      const Tensor exact_right = of_right.exact(right.narrow(1, column, columns));
      Tensor exact = of_product.view(rows, columns);
      if (added.defined()) {
        exact.copy_(part(added));
        at::cpu::addmm_(exact, exact_left, exact_right, beta, alpha);
      } else {
        at::cpu::mm_out(exact, exact_left, exact_right);
      }
      part(out).copy_(exact);
    }
  }
}

void multiply_batches(const Tensor& out, const Tensor& added, const Tensor& left, const Tensor& right,
                      const Scalar& beta, const Scalar& alpha) {
  const int64_t B = left.size(0), each = left.size(1) * left.size(2) + right.size(1) * right.size(2) + out[0].numel();
  const int64_t deep = RIGHT / std::max<int64_t>(each, 1);
  if (deep == 0) {
    for (int64_t b = 0; b < B; ++b) {
      multiply(out[b], added.defined() ? added[b] : added, left[b], right[b], beta, alpha);
    }
    return;
  }
  for (int64_t b = 0; b < B; b += deep) {
    const auto part = [&](const Tensor& whole) { return whole.narrow(0, b, std::min(deep, B - b)); };
    const Tensor exact_left = part(left).to(at::kFloat), exact_right = part(right).to(at::kFloat);
    part(out).copy_(added.defined()
        ? at::cpu::baddbmm(part(added).to(at::kFloat), exact_left, exact_right, beta, alpha)
        : at::cpu::bmm(exact_left, exact_right));
  }
}

void multiply_any(const Tensor& out, const Tensor& added, const Tensor& left, const Tensor& right, const Scalar& beta,
                  const Scalar& alpha) {
  if (out.numel() == 0) return;
  const Tensor whole = added.defined() ? added.expand(out.sizes()) : added;
  (left.dim() == 2 ? multiply : multiply_batches)(out, whole, left, right, beta, alpha);
}

Tensor fresh(const Tensor& added, const Tensor& left, const Tensor& right, const Scalar& beta, const Scalar& alpha) {
  Tensor out = at::empty(shape_of(left, right), left.options());
  multiply_any(out, added, left, right, beta, alpha);
  return out;
}

bool takes(const Tensor& out, const Tensor& left, const Tensor& right) {
  return is_bf16(out) && out.sizes() == at::IntArrayRef(shape_of(left, right)) && !out.is_alias_of(left) &&
      !out.is_alias_of(right);
}

Tensor mm(const Tensor& left, const Tensor& right) {
  return is_ours(left, right, 2) ? fresh({}, left, right, 1, 1) : at::cpu::mm(left, right);
}

Tensor bmm(const Tensor& left, const Tensor& right) {
  return is_ours(left, right, 3) ? fresh({}, left, right, 1, 1) : at::cpu::bmm(left, right);
}

Tensor& mm_out(const Tensor& left, const Tensor& right, Tensor& out) {
  if (!is_ours(left, right, 2) || !takes(out, left, right)) return at::cpu::mm_outf(left, right, out);
  multiply_any(out, {}, left, right, 1, 1);
  return out;
}

Tensor& bmm_out(const Tensor& left, const Tensor& right, Tensor& out) {
  if (!is_ours(left, right, 3) || !takes(out, left, right)) return at::cpu::bmm_outf(left, right, out);
  multiply_any(out, {}, left, right, 1, 1);
  return out;
}

#define HERD_SUMS(NAME, RANK)                                                                                       \
  Tensor NAME(const Tensor& added, const Tensor& left, const Tensor& right, const Scalar& beta,                     \
              const Scalar& alpha) {                                                                                \
    if (!is_ours(left, right, RANK) || !is_bf16(added)) return at::cpu::NAME(added, left, right, beta, alpha);      \
    return fresh(added, left, right, beta, alpha);                                                                  \
  }                                                                                                                 \
  Tensor& NAME##_out(const Tensor& added, const Tensor& left, const Tensor& right, const Scalar& beta,              \
                     const Scalar& alpha, Tensor& out) {                                                            \
    if (!is_ours(left, right, RANK) || !is_bf16(added) || !takes(out, left, right) || out.is_alias_of(added))       \
      return at::cpu::NAME##_outf(added, left, right, beta, alpha, out);                                            \
    multiply_any(out, added, left, right, beta, alpha);                                                             \
    return out;                                                                                                     \
  }                                                                                                                 \
  Tensor& NAME##_(Tensor& added, const Tensor& left, const Tensor& right, const Scalar& beta, const Scalar& alpha) { \
    if (!is_ours(left, right, RANK) || !takes(added, left, right))                                                  \
      return at::cpu::NAME##_(added, left, right, beta, alpha);                                                     \
    multiply_any(added, added, left, right, beta, alpha);                                                           \
    return added;                                                                                                   \
  }

HERD_SUMS(addmm, 2)
HERD_SUMS(baddbmm, 3)

// The forward is left to torch: its blocks are small, and it is no faster in fp32.
std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& logsumexp, double dropout, bool is_causal, const std::optional<Tensor>& mask,
    std::optional<double> scale) {
  if (!is_bf16(query)) {
    return at::cpu::_scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, logsumexp, dropout, is_causal, mask, scale);
  }
  const auto exact = [](const Tensor& one) { return is_bf16(one) ? one.to(at::kFloat) : one; };
  const std::optional<Tensor> exact_mask = mask ? std::optional(exact(*mask)) : mask;
  const auto [query_grad, key_grad, value_grad] = at::cpu::_scaled_dot_product_flash_attention_for_cpu_backward(
      exact(grad), exact(query), exact(key), exact(value), exact(out), exact(logsumexp), dropout, is_causal,
      exact_mask, scale);
  return {query_grad.to(at::kBFloat16), key_grad.to(at::kBFloat16), value_grad.to(at::kBFloat16)};
}

struct Silence : c10::WarningHandler {
  void process(const c10::Warning&) override {}  // that kernels are replaced, which is the purpose
};

// Put these kernels in the place of torch's, or torch's own back.
void replace(bool on) {
  static std::unique_ptr<torch::Library> library;
  if (!on || library) {
    if (!on) library.reset();
    return;
  }
  Silence silence;
  c10::WarningUtils::WarningHandlerGuard guard(&silence);
  library = std::make_unique<torch::Library>(
      torch::Library::IMPL, "aten", c10::DispatchKey::CPU, __FILE__, __LINE__);
  library->impl("mm", mm).impl("mm.out", mm_out).impl("bmm", bmm).impl("bmm.out", bmm_out);
  library->impl("addmm", addmm).impl("addmm.out", addmm_out).impl("addmm_", addmm_);
  library->impl("baddbmm", baddbmm).impl("baddbmm.out", baddbmm_out).impl("baddbmm_", baddbmm_);
  library->impl("_scaled_dot_product_flash_attention_for_cpu_backward", attention_backward);
}

}  // namespace

TORCH_LIBRARY(herd_bf16_products, library) { library.def("replace(bool on) -> ()", replace); }
