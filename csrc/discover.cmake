# Finds what the library is built with: torch and, for CUDA kernels, nvcc and CUTLASS. CMakeLists.txt includes this file;
# `cmake -P csrc/discover.cmake` prints what it finds. It looks at installed tools only, never at the machine's devices.
#
# It reads the environment variables of docs/cuda.md and sets the variables that it prints; -DNAME=VALUE sets one by hand.

find_program(FILA_PYTHON NAMES python3 python DOC "The Python whose packages are used")

function(fila_package_folder NAME RESULT) # of a Python package, found without importing it
  set(SCRIPT [[
import sys, importlib.util
spec = importlib.util.find_spec(sys.argv[1])
print(*list(spec.submodule_search_locations or [])[:1] if spec else [], end="")]])
  execute_process(COMMAND "${FILA_PYTHON}" -c "${SCRIPT}" ${NAME} OUTPUT_VARIABLE FOLDER ERROR_QUIET)
  set(${RESULT} "${FOLDER}" PARENT_SCOPE)
endfunction()

if(NOT FILA_TORCH_DIR)
  fila_package_folder(torch FILA_TORCH_DIR)
endif()
if(NOT FILA_TORCH_DIR)
  message(FATAL_ERROR "torch is not installed where the build runs (pip isolates builds: install torch first, "
                      "then use pip install --no-build-isolation)")
endif()
file(STRINGS "${FILA_TORCH_DIR}/version.py" TORCH_VERSION REGEX "^__version__ *=")
file(STRINGS "${FILA_TORCH_DIR}/version.py" TORCH_CUDA REGEX "^cuda[^=]*= *['\"]")
string(REGEX MATCH "[0-9]+\\.[0-9]+[^'\"]*" TORCH_VERSION "${TORCH_VERSION}")
if(TORCH_VERSION VERSION_LESS 2.11) # the stable ABI that CMakeLists.txt targets
  message(FATAL_ERROR "expected torch 2.11 or newer, got '${TORCH_VERSION}' in ${FILA_TORCH_DIR}")
endif()

# CUDA kernels: whether, and by which tools.
set(CUDA_CHOICE "${FILA_CUDA}")
if("${CUDA_CHOICE}" STREQUAL "")
  set(CUDA_CHOICE "$ENV{FILA_KERNELS_BUILD_CUDA}")
endif()
if("${CUDA_CHOICE}" STREQUAL "")
  set(CUDA_CHOICE auto)
elseif(NOT CUDA_CHOICE MATCHES "^(auto|0|1)$")
  message(FATAL_ERROR "FILA_KERNELS_BUILD_CUDA: expected 0, 1 or auto, got '${CUDA_CHOICE}'")
endif()

if(NOT CMAKE_CUDA_COMPILER)
  foreach(NAME IN ITEMS "$ENV{CUDACXX}" "$ENV{CUDA_HOME}/bin/nvcc" nvcc /usr/local/cuda/bin/nvcc)
    if(NAME)
      find_program(FILA_NVCC NAMES "${NAME}" DOC "The CUDA compiler")
    endif()
  endforeach()
  if(FILA_NVCC)
    set(CMAKE_CUDA_COMPILER "${FILA_NVCC}")
  endif()
endif()

if(NOT FILA_CUTLASS_DIR)
  if(NOT "$ENV{CUTLASS_PATH}" STREQUAL "")
    set(FOLDERS "$ENV{CUTLASS_PATH}/include" "$ENV{CUTLASS_PATH}")
  else()
    fila_package_folder(cutlass_library FOLDERS) # of the distribution nvidia-cutlass
    set(FOLDERS "${FOLDERS}/source/include")
  endif()
  foreach(FOLDER IN LISTS FOLDERS)
    if(NOT FILA_CUTLASS_DIR AND EXISTS "${FOLDER}/cutlass/cutlass.h")
      set(FILA_CUTLASS_DIR "${FOLDER}")
    endif()
  endforeach()
endif()

set(MISSING "")
if(NOT CMAKE_CUDA_COMPILER)
  set(MISSING "nvcc was not found (looked at CUDACXX, CUDA_HOME, PATH and /usr/local/cuda)")
elseif(NOT EXISTS "${FILA_CUTLASS_DIR}/cutlass/cutlass.h")
  set(MISSING "the headers of CUTLASS were not found (pip install --no-deps nvidia-cutlass==4.2.0.0, "
              "CUTLASS_PATH names another copy)")
  string(CONCAT MISSING ${MISSING})
endif()
if(NOT FILA_WITHOUT_CUDA)
  if(CUDA_CHOICE STREQUAL "0")
    set(FILA_WITHOUT_CUDA "FILA_KERNELS_BUILD_CUDA=0 when it was built")
  elseif(CUDA_CHOICE STREQUAL "auto" AND NOT TORCH_CUDA)
    set(FILA_WITHOUT_CUDA
        "it was built beside a torch without CUDA (FILA_KERNELS_BUILD_CUDA=1 builds them nevertheless)")
  elseif(MISSING AND CUDA_CHOICE STREQUAL "1")
    message(FATAL_ERROR "${MISSING}")
  else()
    set(FILA_WITHOUT_CUDA "${MISSING}")
  endif()
endif()
# One line that ends neither a list of CMake's nor the raw string in csrc/build_info.cpp.
string(REPLACE ";" "," FILA_WITHOUT_CUDA "${FILA_WITHOUT_CUDA}")
string(REPLACE ")FILA\"" ")" FILA_WITHOUT_CUDA "${FILA_WITHOUT_CUDA}")

# What to compile CUDA kernels for, as PyTorch writes it, and how many units at a time.
if(FILA_WITHOUT_CUDA)
  set(FILA_CUDA_ARCHITECTURES "")
else()
  set(ASKED "${FILA_CUDA_ARCHITECTURES}")
  if(NOT ASKED)
    set(ASKED "$ENV{TORCH_CUDA_ARCH_LIST}")
  endif()
  if("${ASKED}" STREQUAL "")
    set(ASKED 8.0 9.0a 10.0a)
  endif()
  string(REGEX REPLACE "[;, \t]+" ";" WORDS "${ASKED}")
  set(FILA_CUDA_ARCHITECTURES "")
  foreach(WORD IN LISTS WORDS)
    if("${WORD}" STREQUAL "")
      continue()
    elseif(NOT WORD MATCHES "^([0-9]+)\\.[0-9][af]?(\\+PTX)?$")
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: expected numbers such as 8.0, 9.0a or 10.0a+PTX, separated by "
                          "semicolons or spaces, got '${WORD}' in '${ASKED}'")
    elseif(CMAKE_MATCH_1 LESS 8)
      message(WARNING "TORCH_CUDA_ARCH_LIST: the kernels need 8.0 or above, ${WORD} is left out")
    else()
      list(APPEND FILA_CUDA_ARCHITECTURES ${WORD})
    endif()
  endforeach()
  list(REMOVE_DUPLICATES FILA_CUDA_ARCHITECTURES)
  if(NOT FILA_CUDA_ARCHITECTURES)
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: expected an architecture of 8.0 or above, got '${ASKED}'")
  endif()

  set(FILA_CUDA_JOBS "$ENV{MAX_JOBS}")
  if("${FILA_CUDA_JOBS}" STREQUAL "")
    cmake_host_system_information(RESULT CORES QUERY NUMBER_OF_LOGICAL_CORES)
    cmake_host_system_information(RESULT MEGABYTES QUERY TOTAL_PHYSICAL_MEMORY)
    math(EXPR FILA_CUDA_JOBS "${MEGABYTES} / 4096") # what one unit may take
    if(FILA_CUDA_JOBS GREATER CORES)
      set(FILA_CUDA_JOBS ${CORES})
    elseif(FILA_CUDA_JOBS LESS 1)
      set(FILA_CUDA_JOBS 1)
    endif()
  elseif(NOT FILA_CUDA_JOBS MATCHES "^[1-9][0-9]*$")
    message(FATAL_ERROR "MAX_JOBS: expected a number of 1 or more, got '${FILA_CUDA_JOBS}'")
  endif()
endif()

if(CMAKE_SCRIPT_MODE_FILE STREQUAL CMAKE_CURRENT_LIST_FILE)
  foreach(NAME FILA_TORCH_DIR CMAKE_CUDA_COMPILER FILA_CUTLASS_DIR FILA_CUDA_ARCHITECTURES FILA_CUDA_JOBS
               FILA_WITHOUT_CUDA)
    message("${NAME}=${${NAME}}")
  endforeach()
endif()
