# libliverelay: what programs in other languages link to or load (csrc/include/liverelay.h), and how they find it.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

file(STRINGS csrc/include/liverelay.h abi_line REGEX "define LIVERELAY_ABI ")
string(REGEX REPLACE ".* ([0-9]+)u" "\\1" LIVERELAY_ABI "${abi_line}")

add_library(liverelay_client OBJECT csrc/control.cpp csrc/client.cpp csrc/liverelay.cpp)
target_compile_definitions(liverelay_client PRIVATE LIVERELAY_VERSION="${LIVERELAY_VERSION}")
target_include_directories(liverelay_client PRIVATE csrc)
set_target_properties(liverelay_client PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)

set(OBJECTS $<TARGET_OBJECTS:liverelay_client> $<TARGET_OBJECTS:liverelay_core>)
add_library(liverelay SHARED ${OBJECTS})
add_library(liverelay_static STATIC ${OBJECTS})
set_target_properties(liverelay PROPERTIES VERSION ${LIVERELAY_VERSION} SOVERSION ${LIVERELAY_ABI})
# Nothing but the interface is seen: not even the C++ library's templates.
target_link_options(liverelay PRIVATE LINKER:--version-script=${PROJECT_SOURCE_DIR}/cmake/liverelay.map)
set_target_properties(liverelay PROPERTIES LINK_DEPENDS ${PROJECT_SOURCE_DIR}/cmake/liverelay.map)
set_target_properties(liverelay_static PROPERTIES OUTPUT_NAME liverelay EXPORT_NAME static)
set_target_properties(liverelay liverelay_static PROPERTIES LINKER_LANGUAGE CXX)
foreach(target liverelay liverelay_static)
  target_include_directories(${target} INTERFACE $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>
                                                 $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/csrc/include>)
  if(RT_LIBRARY)
    target_link_libraries(${target} PRIVATE rt)
  endif()
endforeach()

install(TARGETS liverelay liverelay_static EXPORT liverelay
        LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(FILES csrc/include/liverelay.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
set(package ${CMAKE_INSTALL_LIBDIR}/cmake/liverelay)
install(EXPORT liverelay NAMESPACE liverelay:: FILE liverelayConfig.cmake DESTINATION ${package})
write_basic_package_version_file(liverelayConfigVersion.cmake VERSION ${LIVERELAY_VERSION}
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/liverelayConfigVersion.cmake DESTINATION ${package})
file(RELATIVE_PATH UP /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
configure_file(cmake/liverelay.pc.in liverelay.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/liverelay.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
