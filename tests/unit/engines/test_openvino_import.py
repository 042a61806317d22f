import subprocess
import sys


def test_openvino_is_imported_without_its_telemetry():
    code = (
        "import sys\n"
        "from sparse_exp.engines.openvino import import_openvino\n"
        "assert 'openvino' not in sys.modules\n"
        "assert import_openvino() is sys.modules['openvino']\n"
        "print(sys.modules['openvino_telemetry'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"  # what cannot be imported
