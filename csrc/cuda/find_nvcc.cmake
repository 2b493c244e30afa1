# Looks for a CUDA compiler that can build this backend. Sets nvcc, cuda_version, architectures,
# cuda_includes and cudart (its static library), or else no_cuda: in words, why there is none.

set(no_cuda "")
if(NOT FASTOPT_CUDA)
  set(no_cuda "FASTOPT_CUDA=${FASTOPT_CUDA} asked for none")
  return()
endif()

# The last place is where pip puts nvidia-cuda-nvcc.
file(GLOB wheels "${Python_SITELIB}/nvidia/*/bin")
unset(nvcc CACHE)  # looked for anew each time: the environment may have changed
find_program(nvcc nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin
             PATHS /usr/local/cuda/bin ${wheels})
if(NOT nvcc)
  set(no_cuda "nvcc was not found; put it on PATH, set CUDA_HOME or pip install nvidia-cuda-nvcc")
  return()
endif()

execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE said ERROR_VARIABLE said)
string(REGEX MATCH "release ([0-9.]+)" found "${said}")
set(cuda_version "${CMAKE_MATCH_1}")
if(NOT found OR cuda_version VERSION_LESS 12.4)
  set(no_cuda "${nvcc} is of CUDA ${cuda_version}, the oldest that will do is 12.4")
  return()
endif()

# Machine code for one capability runs on later ones with the same first digit, too.
execute_process(COMMAND ${nvcc} --list-gpu-code OUTPUT_VARIABLE known)
string(REGEX MATCHALL "[0-9]+" known "${known}")
if(FASTOPT_CUDA_ARCHITECTURES)
  string(REGEX MATCHALL "[0-9]+" architectures "${FASTOPT_CUDA_ARCHITECTURES}")
  foreach(architecture IN LISTS architectures)
    if(NOT architecture IN_LIST known)
      message(FATAL_ERROR "FASTOPT_CUDA_ARCHITECTURES=${FASTOPT_CUDA_ARCHITECTURES}, but ${nvcc} "
                          "knows no ${architecture}, only: ${known}")
    endif()
  endforeach()
else()
  set(architectures 75 80 90 100 120)
  string(REPLACE ";" "|" known "${known}")
  list(FILTER architectures INCLUDE REGEX "^(${known})$")
endif()
list(SORT architectures COMPARE NATURAL)

# What fails here would fail later: a host compiler too new for this nvcc, files that are missing.
set(probe "${CMAKE_CURRENT_BINARY_DIR}/probe")
file(WRITE "${probe}.cu" "#include <cuda_runtime.h>\n__global__ void kernel() {}\n"
                         "int main() { kernel<<<1, 1>>>(); return cudaGetLastError(); }\n")
set(compile ${nvcc} -ccbin ${CMAKE_CXX_COMPILER} -std=c++17 "${probe}.cu" -o "${probe}")
execute_process(COMMAND ${compile} RESULT_VARIABLE failed OUTPUT_VARIABLE said ERROR_VARIABLE said)
if(failed)
  string(REGEX MATCH "[^\n]*(error|cannot|not found)[^\n]*" reason "${said}")
  set(no_cuda "${nvcc} does not compile with ${CMAKE_CXX_COMPILER} (${reason}); set CXX to another")
  return()
endif()

execute_process(COMMAND ${compile} --dryrun OUTPUT_VARIABLE said ERROR_VARIABLE said)
string(REGEX MATCHALL "\"-[IL][^\"]+" folders "${said}")
set(cuda_includes ${folders})
list(FILTER cuda_includes INCLUDE REGEX "-I")
list(FILTER folders INCLUDE REGEX "-L")
list(TRANSFORM cuda_includes REPLACE "^\"-I" "")
list(TRANSFORM folders REPLACE "^\"-L" "")
list(REMOVE_DUPLICATES cuda_includes)
unset(cudart CACHE)
find_library(cudart libcudart_static.a PATHS ${folders})
if(NOT cudart)
  set(no_cuda "libcudart_static.a, which belongs to ${nvcc}, was not found")
endif()
