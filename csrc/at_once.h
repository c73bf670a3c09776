// Decides which calls C++ makes on its own: those of plain arguments for which every check of bird_kernels/inputs.py holds and
// `backends.resolve` would choose the native backend. All others, wrong ones too, are left to Python, which has the errors.
#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/extension.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <optional>
#include <string_view>
#include <vector>

#include "kernels.h"

namespace bird {
namespace {

// A call whose arguments have been checked: x and y of the first pair, of the second, ...
struct Call {
  std::vector<at::Tensor> sides;
  bool listed;  // the result is a vector, of one pair too
  std::optional<at::Tensor> mask;
  int64_t statistic;  // a Statistic
  bool unbiased, exact;
};

// The positions of the fields of types.Options.
enum Field { STATISTIC, KERNEL, ESTIMATOR, ROW_DIMS, GROUP, CENTER, BACKEND, PRECISION, FIELDS };

// The characters of a str; empty for anything else, subclasses of str too.
std::string_view text(py::handle object) {
  if (!PyUnicode_CheckExact(object.ptr())) return {};
  Py_ssize_t size = 0;
  const char* const data = PyUnicode_AsUTF8AndSize(object.ptr(), &size);
  if (data != nullptr) return {data, static_cast<size_t>(size)};
  PyErr_Clear();  // a lone surrogate has no UTF-8
  return {};
}

// Whether an object is an ordinary tensor with `dim` dimensions on a CPU or CUDA device: no subclass, no wrapper of a transform, no
// lazy negative, whose memory holds other numbers than its value, and no inference tensor that autograd would have to save.
bool is_plain(py::handle object, int64_t dim) {
  using c10::DispatchKey;
  static const c10::DispatchKeySet PLAIN(
      {DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::AutogradCPU, DispatchKey::AutogradCUDA, DispatchKey::ADInplaceOrView,
       DispatchKey::AutocastCPU, DispatchKey::AutocastCUDA});
  if (!THPVariable_CheckExact(object.ptr())) return false;
  const at::Tensor& tensor = THPVariable_Unpack(object.ptr());
  return PLAIN.isSupersetOf(tensor.key_set()) && tensor.dim() == dim && !(tensor.is_inference() && at::GradMode::is_enabled());
}

// Whether a torch.func transform, torch.jit.trace or a dispatch mode is active, which must see operators, as in ops.watched (Python
// checks for torch.compile).
bool is_watched() {
  using c10::DispatchKey;
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  const c10::DispatchKeySet transforms(
      {DispatchKey::FuncTorchDynamicLayerFrontMode, DispatchKey::FuncTorchDynamicLayerBackMode, DispatchKey::Tracer});
  return included.has_any(transforms) || c10::impl::TorchDispatchModeTLS::any_modes_set();
}

// The length of a list or tuple; 0 for anything else, subclasses too.
size_t length(py::handle object) {
  const bool is_sequence = PyList_CheckExact(object.ptr()) || PyTuple_CheckExact(object.ptr());
  return is_sequence ? static_cast<size_t>(PySequence_Fast_GET_SIZE(object.ptr())) : 0;
}

class AtOnce {
 public:
  static inline std::atomic<int64_t> generation{0};  // answers of an earlier one are asked for again

  // `most` is backends.most_at_once, (backend, dtype, device) -> int: up to how many numbers in x and y together a call of one pair
  // with that backend argument and few rows is made here. `shares`, (x, y, mask, options) -> bool: whether a call of two lists is.
  AtOnce(py::function most, py::function shares) : most_(std::move(most)), shares_(std::move(shares)) {}

  // The checked call of x, y, two tensors or two lists of them, a mask or None and a types.Options; nullopt if it is left to Python.
  std::optional<Call> operator()(py::handle x_object, py::handle y_object, py::handle mask_object, const py::tuple& options) {
    if (options.size() != FIELDS) return {};
    const auto option = [&](Field field) { return py::handle(PyTuple_GET_ITEM(options.ptr(), field)); };
    const py::handle row_dims = option(ROW_DIMS), backend = option(BACKEND), precision = option(PRECISION);
    if (!option(GROUP).is_none() || option(CENTER).ptr() != Py_True) return {};
    const std::string_view requested = text(backend), kind = text(option(ESTIMATOR)), quantity = text(option(STATISTIC));
    const bool automatic = requested == "auto", unbiased = kind == "unbiased", masked = !mask_object.is_none();
    const bool loss = quantity == "cka_loss", cka = quantity == "cka";
    if (!loss && !cka && quantity != "hsic") return {};
    if (!automatic && requested != "native") return {};
    if (text(option(KERNEL)) != "linear" || (!unbiased && kind != "biased")) return {};
    int overflow = 0;
    if (!PyLong_CheckExact(row_dims.ptr()) || PyLong_AsLongAndOverflow(row_dims.ptr(), &overflow) != 1) return {};

    const size_t pairs = length(x_object);
    if (pairs != length(y_object) || pairs > MAX_PAIRS || (pairs > 0 && !loss)) return {};
    std::vector<at::Tensor> sides;
    sides.reserve(2 * std::max<size_t>(pairs, 1));
    for (size_t i = 0; i < std::max<size_t>(pairs, 1); ++i) {
      for (const py::handle side : {x_object, y_object}) {
        const py::handle object = pairs ? py::handle(PySequence_Fast_GET_ITEM(side.ptr(), i)) : side;
        if (!is_plain(object, 2)) return {};
        sides.push_back(THPVariable_Unpack(object.ptr()));
      }
    }
    if ((masked && !is_plain(mask_object, 1)) || is_watched()) return {};
    const at::Tensor& x = sides[0];
    const int64_t n = x.size(0);
    const at::ScalarType type = x.scalar_type();
    if (n > MAX_ROWS || n < (unbiased ? 4 : 2)) return {};
    if (type != at::kFloat && type != at::kHalf && type != at::kBFloat16) return {};
    for (const at::Tensor& side : sides) {
      if (side.size(0) != n || side.size(1) == 0 || side.scalar_type() != type || side.device() != x.device()) return {};
    }
    std::optional<at::Tensor> mask;
    if (masked) {
      mask = THPVariable_Unpack(mask_object.ptr());
      if (mask->scalar_type() != at::kBool || mask->size(0) != n || mask->device() != x.device()) return {};
    }

    bool tf32 = false;  // as native._options
    if (precision.is_none()) {
      tf32 = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) == at::Float32Precision::TF32;
    } else {
      const std::string_view name = text(precision);
      tf32 = name == "tf32";
      if (!tf32 && name != "ieee" && name != "tf32x3") return {};
    }
    const bool exact = type == at::kFloat && !tf32;
    const std::vector<int64_t> device{automatic, static_cast<int64_t>(x.device().type()), x.device().index(), static_cast<int64_t>(type)};
    if (pairs > 1) {
      std::vector<int64_t> key(device);
      key.insert(key.end(), {unbiased, masked, exact, text(precision) == "tf32x3", n});
      for (const at::Tensor& side : sides) key.push_back(2 * side.size(1) + (at::GradMode::is_enabled() && side.requires_grad()));
      if (!known(std::move(key), [&] { return shares_(x_object, y_object, mask_object, options).cast<bool>(); })) return {};
    } else {
      const int64_t most = known(std::vector<int64_t>(device), [&] {
        const py::object any = py::reinterpret_steal<py::object>(THPVariable_Wrap(x));
        return most_(backend, any.attr("dtype"), any.attr("device")).template cast<int64_t>();
      });
      if (x.numel() + sides[1].numel() > most) return {};
    }
    const Statistic wanted = loss ? Statistic::cka_loss : cka ? Statistic::cka : Statistic::hsic;
    return Call{std::move(sides), pairs > 0, std::move(mask), static_cast<int64_t>(wanted), unbiased, exact};
  }

 private:
  // The answer that was given for a key, or what `ask` returns.
  template <class Ask>
  int64_t known(std::vector<int64_t> key, Ask ask) {
    if (generation_ != generation || answers_.size() > 4096) {
      generation_ = generation;
      answers_.clear();
    }
    if (const auto found = answers_.find(key); found != answers_.end()) return found->second;
    const int64_t asked = generation_, answer = ask();  // Python may run another thread meanwhile, which may clear the answers
    if (asked == generation) answers_[std::move(key)] = answer;
    return answer;
  }

  py::function most_, shares_;
  int64_t generation_ = 0;
  std::map<std::vector<int64_t>, int64_t> answers_;  // of both functions, whose keys differ in length
};

}  // namespace
}  // namespace bird
