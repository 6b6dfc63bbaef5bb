"""The Python packages behind a storage's URL, which are not ours to install: named before they are missed.

check_driver("postgresql://host/optuna")        # EnvironmentFault: pip install 'psycopg[binary]'
"""

from importlib.util import find_spec

from herd.run.errors import ConfigError, EnvironmentFault
from herd.run.store import shown

PACKAGES = {"postgresql": "'psycopg[binary]'", "mysql": "mysqlclient", "grpc": "grpcio protobuf"}
"""What SQLAlchemy and Optuna import for a URL that names no driver."""


def check_driver(url: str) -> None:
    """Raise EnvironmentFault when the URL's driver is not installed, ConfigError when there is none of that name."""
    kind, _, named = url.partition(":")[0].partition("+")
    if kind in ("sqlite", "journal") and not named:
        return
    if kind == "grpc":
        there = find_spec("grpc") is not None
    else:
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError, NoSuchModuleError

        try:
            make_url(url).get_dialect().import_dbapi()
            there = True
        except NoSuchModuleError:
            raise ConfigError(
                f"storage = {shown(url)}: SQLAlchemy knows no driver {named}; leave out +{named}"
            ) from None
        except (ArgumentError, ValueError):
            raise ConfigError(
                f"storage = {shown(url)}: no URL of a database; write scheme://user:password@host:port/name"
            ) from None
        except ImportError:
            there = False
    if not there:
        raise EnvironmentFault(f"storage = {shown(url)}: its driver is missing; pip install {named or PACKAGES[kind]}")
