"""What secure sums cost on the line, beside the masked row itself."""

import numpy as np

from hansa.aggregators.secure_mean import SecureMean
from hansa.core.chain import Raw
from hansa.core.protocols import Report, Slot
from hansa.secagg.packing import packed_size
from hansa.wire import pack_report
from support_secagg import LIMITS, Table, grid_rows


def test_all_that_a_client_of_1000_sends_is_within_2_percent_of_its_row_of_a_million():
    """Measured with 64 clients; what each of the more neighbours costs is known."""
    table = Table(SecureMean(), grid_rows(64), is_signed=True)
    table.play()
    sent = 0
    for exchange, reports in table.history.items():
        said = next(report for report in reports if report.clients == ("c00",))
        sent += len(pack_report(Report(Slot(0, 0, exchange), said.clients, said.payload), Raw()))
    here, there = table.server.terms.graph(64), table.server.terms.graph(1000)
    certificate = 1000  # bytes of a real one in base64, where the test's have 32
    beside = sent + certificate + (88 + 44) * (there.degree - here.degree)
    row = packed_size(1_000_000, SecureMean().fitted(LIMITS)._widths(1000)[0])
    assert row == 1_000_000 * 26 // 8
    assert 8_000 < beside < 0.02 * row
    assert np.isclose(beside / row, 0.006, atol=0.002)
