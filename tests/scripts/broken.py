"""Fails before it trains, as scripts do."""

import no_such_package

no_such_package.train()
