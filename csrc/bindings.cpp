// The Python module of the native backend: allocates, selects the stream, launches, and implements autograd. Users' arguments are
// checked in bird_kernels/inputs.py, or by at_once.h for calls that C++ makes on its own.
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/extension.h>

#ifdef BIRD_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include "at_once.h"
#include "kernels.h"

namespace bird {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

#ifdef BIRD_CUDA
namespace device = cuda;
constexpr bool BUILT_WITH_CUDA = true;
#else
namespace device = emulation;
constexpr bool BUILT_WITH_CUDA = false;
#endif

// The device of a tensor, current while this exists.
struct Device {
  int multiprocessors = 4;  // of the emulation on a CPU, so that tests split the products of narrow features, too
  void* stream = nullptr;
  bool emulated;

  explicit Device(const Tensor& x) : emulated(!x.is_cuda()) {
#ifdef BIRD_CUDA
    if (emulated) return;
    guard_.set_device(x.device());
    multiprocessors = cuda::multiprocessors(x.get_device());
    stream = c10::cuda::getCurrentCUDAStream().stream();
  }

 private:
  c10::cuda::OptionalCUDAGuard guard_;
#else
    TORCH_CHECK(emulated, "bird_kernels: the native part was built without CUDA");
  }
#endif
};

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Type::f32;
    case at::kHalf: return Type::f16;
    case at::kBFloat16: return Type::bf16;
    default: TORCH_CHECK_TYPE(false, "bird_kernels: the native part has no kernels for ", x.scalar_type());
  }
}

Features features(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.size(1), 0, 0}; }

const bool* mask_data(const Tensor& mask) { return mask.defined() ? mask.const_data_ptr<bool>() : nullptr; }

Tensor dense(const std::optional<Tensor>& mask) { return mask && mask->defined() ? mask->contiguous() : Tensor(); }

// What the forward of some pairs leaves: values [pairs] (0-d for one), coefficients [pairs, 11], the locations of all features,
// which are for the backward alone, and the Gram matrices [pairs, 2, n, n].
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// `sides` are x [n, p] and y [n, q] of the first pair, of the second, ... If they were `listed`, the value of one pair is a vector, too.
Results forward(
    const std::vector<Tensor>& sides, const std::optional<Tensor>& given_mask, int64_t statistic, bool unbiased, bool exact, bool listed) {
  const Tensor& x = sides[0];
  const int64_t n = x.size(0), pairs = static_cast<int64_t>(sides.size()) / 2;
  TORCH_CHECK_VALUE(n <= MAX_ROWS, "bird_kernels: the native part takes at most ", MAX_ROWS, " rows, got ", n);
  TORCH_CHECK_VALUE(pairs <= MAX_PAIRS, "bird_kernels: the native part takes at most ", MAX_PAIRS, " pairs, got ", pairs);
  const Device here(x);
  const Tensor mask = dense(given_mask);
  const auto fp32 = x.options().dtype(at::kFloat).requires_grad(false), fp64 = fp32.dtype(at::kDouble);
  Forward call{};
  for (const Tensor& side : sides) call.sides[call.count++] = features(side);
  call.n = static_cast<int>(n);
  plan_forward(call, here.multiprocessors);
  const Features& last = call.sides[call.count - 1];
  const int64_t partials = static_cast<int64_t>(call.splits) * call.shape.pairs * call.shape.tile * call.shape.tile;
  const int64_t slots = pairs * 2 * MAX_REDUCE_BLOCKS * MOMENTS;
  const Tensor workspace = at::empty({partials}, fp32), sums = at::empty({slots + pairs}, fp64);  // and the counters
  const Tensor values = pairs == 1 && !listed ? at::empty({}, fp32) : at::empty({pairs}, fp32);
  const Tensor coefficients = at::empty({pairs, COEFFICIENTS}, fp64);
  const Tensor locations = at::empty({(last.chunk + chunks_of(last)) * 2 * CHUNK}, fp32), grams = at::empty({pairs, 2, n, n}, fp32);
  call.mask = mask_data(mask);
  call.statistic = static_cast<Statistic>(statistic);
  call.unbiased = unbiased;
  call.partials = workspace.mutable_data_ptr<float>();
  call.slots = sums.mutable_data_ptr<double>();
  call.counters = reinterpret_cast<int*>(call.slots + slots);
  call.locations = locations.mutable_data_ptr<float>();
  call.grams = grams.mutable_data_ptr<float>();
  call.coefficients = coefficients.mutable_data_ptr<double>();
  call.values = values.mutable_data_ptr<float>();
  (here.emulated ? emulation::forward : device::forward)(type_of(x), exact, call, here.stream);
  return {values, coefficients, locations, grams};
}

// The gradients of the wanted sides, in the dtype of the features, times the upstream `grads` [pairs]; others are undefined.
std::vector<Tensor> backward(
    const Tensor& grads, const std::vector<Tensor>& sides, const std::optional<Tensor>& given_mask, const Tensor& coefficients,
    const Tensor& locations, const Tensor& grams, bool unbiased, bool exact, const std::vector<bool>& wanted) {
  const Tensor& x = sides[0];
  const Device here(x);
  const Tensor mask = dense(given_mask);
  std::vector<Tensor> gradients(sides.size());
  Backward call{};
  int64_t chunks = 0;
  for (size_t i = 0; i < sides.size(); ++i) {
    Features own = features(sides[i]);
    own.chunk = static_cast<int>(chunks);
    chunks += chunks_of(own);
    if (!wanted[i]) continue;
    gradients[i] = at::empty(sides[i].sizes(), sides[i].options().requires_grad(false));
    call.sides[call.count++] = {own, gradients[i].mutable_data_ptr(), static_cast<int>(i)};
  }
  if (call.count == 0) return gradients;
  call.mask = mask_data(mask);
  call.n = static_cast<int>(x.size(0));
  call.unbiased = unbiased;
  call.coefficients = coefficients.const_data_ptr<double>();
  call.locations = locations.const_data_ptr<float>();
  call.grams = grams.const_data_ptr<float>();
  const Tensor upstream = (grads.scalar_type() == at::kFloat ? grads : grads.to(at::kFloat)).contiguous();
  call.grads = upstream.const_data_ptr<float>();
  (here.emulated ? emulation::backward : device::backward)(type_of(x), exact, call, here.multiprocessors, here.stream);
  return gradients;
}

// The Python function (grad, x, y, mask, coefficients, locations, grams, statistic, unbiased, exact, x_grad, y_grad) -> (dx, dy)
// that computes the backward of a pair which is differentiated itself, runs under a dispatch mode, or whose upstream gradient is a
// lazy negative or batched. It is never destroyed, because the interpreter may be finalised before static objects are.
py::object& differentiable_backward() {
  static py::object* const function = new py::object();
  return *function;
}

// Of one pair or many; arguments as of `forward`.
class Alignment : public torch::autograd::Function<Alignment> {
 public:
  static Tensor forward(
      AutogradContext* context, at::TensorList sides, const std::optional<Tensor>& mask, int64_t statistic, bool unbiased, bool exact,
      bool listed) {
    auto [values, coefficients, locations, grams] = bird::forward(sides.vec(), mask, statistic, unbiased, exact, listed);
    variable_list saved = sides.vec();
    saved.insert(saved.end(), {mask.value_or(Tensor()), coefficients, locations, grams});
    context->save_for_backward(std::move(saved));
    context->saved_data["statistic"] = statistic;
    context->saved_data["unbiased"] = unbiased;
    context->saved_data["exact"] = exact;
    return values;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    variable_list sides = context->get_saved_variables();
    const size_t count = sides.size() - 4;
    const Tensor mask = sides[count], coefficients = sides[count + 1], locations = sides[count + 2], grams = sides[count + 3];
    sides.resize(count);
    const auto statistic = context->saved_data["statistic"].toInt();
    const bool unbiased = context->saved_data["unbiased"].toBool(), exact = context->saved_data["exact"].toBool();
    std::vector<bool> wanted;
    for (size_t i = 0; i < count; ++i) wanted.push_back(context->needs_input_grad(i));
    const bool batched = grads[0].key_set().has(c10::DispatchKey::Batched);  // torch.autograd.grad(is_grads_batched=True)
    variable_list gradients;
    if (at::GradMode::is_enabled() || c10::impl::TorchDispatchModeTLS::any_modes_set() || grads[0].is_neg() || batched) {
      const py::gil_scoped_acquire python;
      int64_t begin = 0;
      for (size_t i = 0; i < count; i += 2) {
        const int64_t own = (chunks_of(features(sides[i])) + chunks_of(features(sides[i + 1]))) * 2 * CHUNK;
        const auto pair = static_cast<int64_t>(i / 2);
        const py::object result = differentiable_backward()(
            grads[0].dim() ? grads[0].select(-1, pair) : grads[0], sides[i], sides[i + 1], mask, coefficients.narrow(0, pair, 1),
            locations.narrow(0, begin, own), grams.narrow(0, pair, 1), statistic, unbiased, exact, bool(wanted[i]), bool(wanted[i + 1]));
        for (const auto& gradient : result.cast<std::vector<std::optional<Tensor>>>()) gradients.push_back(gradient.value_or(Tensor()));
        begin += own;
      }
    } else {
      gradients = bird::backward(grads[0], sides, mask, coefficients, locations, grams, unbiased, exact, wanted);
    }
    gradients.resize(count + 5);
    return gradients;
  }
};

}  // namespace
}  // namespace bird

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using MaybeTensor = std::optional<at::Tensor>;
  m.attr("MAX_ROWS") = bird::MAX_ROWS;
  m.attr("MAX_PAIRS") = bird::MAX_PAIRS;
  m.attr("CUDA") = bird::BUILT_WITH_CUDA;
  m.def(
      "alignment",
      [](const at::Tensor& x, const at::Tensor& y, const MaybeTensor& mask, int64_t statistic, bool unbiased, bool exact) {
        return bird::Alignment::apply(at::TensorList({x, y}), mask, statistic, unbiased, exact, false);
      },
      py::call_guard<py::gil_scoped_release>());
  // A function of x, y, mask and types.Options that makes a whole public call, or returns None to leave it to Python.
  m.def("at_once_where", [](py::function most, py::function shares) {
    return py::cpp_function(
        [checked = bird::AtOnce(std::move(most), std::move(shares))](
            py::handle x, py::handle y, py::handle mask, const py::tuple& options) mutable -> MaybeTensor {
          const auto call = checked(x, y, mask, options);
          if (!call) return std::nullopt;
          const py::gil_scoped_release others_may_run;
          return bird::Alignment::apply(at::TensorList(call->sides), call->mask, call->statistic, call->unbiased, call->exact, call->listed);
        });
  });
  m.def(
      "forward",
      [](const std::vector<at::Tensor>& sides, const MaybeTensor& mask, int64_t statistic, bool unbiased, bool exact) {
        return bird::forward(sides, mask, statistic, unbiased, exact, false);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("backward", &bird::backward, py::call_guard<py::gil_scoped_release>());  // None for an undefined tensor
  // The blocks of the backward of pairs that share launches, for tests: of n rows and wanted sides of these widths.
  m.def("backward_grid", [](int n, const std::vector<int64_t>& widths, int multiprocessors) {
    bird::Backward call{};
    for (int64_t width : widths) call.sides[call.count++].own.width = width;
    call.n = n;
    return bird::plan_backward(call, multiprocessors);
  });
  m.def("forget", [] { ++bird::AtOnce::generation; });  // the answers that calls at once were given
  m.def("emulated_launches", &bird::emulation::launches);
  m.def("set_differentiable_backward", [](py::object function) { bird::differentiable_backward() = std::move(function); });
}
